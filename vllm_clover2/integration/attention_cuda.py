# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA attention backends with trees.

On Model Runner V2 CUDA graphs of whole passes may hold trees of one size, whose rows
are kept where the graphs read them, and chains, which are causal, wherever the stock
backend may be in one. V1 makes its rows anew in every step: attention stays outside.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_clover2.integration.attention import TreeAttentionMixin
from vllm_clover2.integration.speculative_config import Clover2SpeculativeConfig


class TreeMetadataBuilderMixin(AttentionMetadataBuilder[Any]):
    """Says which CUDA graphs may hold attention to trees."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: Any
    ) -> AttentionCGSupport:
        stock = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        speculative = vllm_config.speculative_config
        if not isinstance(speculative, Clover2SpeculativeConfig):
            return stock  # a plain engine in the same process
        if not speculative.runs_on_v2:
            return AttentionCGSupport.NEVER
        if speculative.tree_options().tree == "chain":
            return stock
        return min(stock, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)


class TreeFlashAttentionImpl(TreeAttentionMixin, FlashAttentionImpl):
    """``FLASH_ATTN`` that sends the rows of trees to our kernel."""


class TreeFlashAttentionMetadataBuilder(
    TreeMetadataBuilderMixin, FlashAttentionMetadataBuilder
):
    """``FLASH_ATTN``'s, in the CUDA graphs that may hold trees."""


class TreeFlashAttentionBackend(FlashAttentionBackend):
    """``FLASH_ATTN`` with trees; keeps its name, by which vLLM looks it up."""

    @staticmethod
    def get_impl_cls() -> type[TreeFlashAttentionImpl]:
        return TreeFlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeFlashAttentionMetadataBuilder]:
        return TreeFlashAttentionMetadataBuilder


class TreeTritonAttentionImpl(TreeAttentionMixin, TritonAttentionImpl):
    """``TRITON_ATTN`` that sends the rows of trees to our kernel."""

    def fused_output_quant_supported(self, quant_key: object) -> bool:
        return False  # our kernel writes no quantized output


class TreeTritonAttentionMetadataBuilder(
    TreeMetadataBuilderMixin, TritonAttentionMetadataBuilder
):
    """``TRITON_ATTN``'s, in the CUDA graphs that may hold trees."""


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """``TRITON_ATTN`` with trees; keeps its name, by which vLLM looks it up."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonAttentionMetadataBuilder]:
        return TreeTritonAttentionMetadataBuilder
