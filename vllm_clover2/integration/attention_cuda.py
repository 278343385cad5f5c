# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA attention backends with trees.

Row counts and masks of trees change from step to step and are not in static buffers,
so attention stays outside CUDA graphs (piecewise graphs around it are fine).
"""

from typing import ClassVar

from vllm.v1.attention.backend import AttentionCGSupport
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


class TreeFlashAttentionImpl(TreeAttentionMixin, FlashAttentionImpl):
    """``FLASH_ATTN`` that sends the rows of trees to our kernel."""


class TreeFlashAttentionMetadataBuilder(FlashAttentionMetadataBuilder):
    """``FLASH_ATTN``'s, outside CUDA graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    @classmethod
    def get_cudagraph_support(cls, *args: object) -> AttentionCGSupport:
        return cls._cudagraph_support


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


class TreeTritonAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    """``TRITON_ATTN``'s, outside CUDA graphs."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    @classmethod
    def get_cudagraph_support(cls, *args: object) -> AttentionCGSupport:
        return cls._cudagraph_support


class TreeTritonAttentionBackend(TritonAttentionBackend):
    """``TRITON_ATTN`` with trees; keeps its name, by which vLLM looks it up."""

    @staticmethod
    def get_impl_cls() -> type[TreeTritonAttentionImpl]:
        return TreeTritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeTritonAttentionMetadataBuilder]:
        return TreeTritonAttentionMetadataBuilder
