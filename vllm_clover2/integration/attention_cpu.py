# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU attention backend with trees."""

from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
)

from vllm_clover2.integration.attention import TreeAttentionMixin


class TreeCPUAttentionImpl(TreeAttentionMixin, CPUAttentionBackendImpl):
    """``CPU_ATTN`` that sends the rows of trees to our kernel."""


class TreeCPUAttentionBackend(CPUAttentionBackend):
    """``CPU_ATTN`` with trees; keeps its name, by which vLLM looks it up."""

    @staticmethod
    def get_impl_cls() -> type[TreeCPUAttentionImpl]:
        return TreeCPUAttentionImpl
