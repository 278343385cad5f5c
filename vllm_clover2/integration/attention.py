# SPDX-License-Identifier: Apache-2.0
"""Attention backends of vLLM that also understand token trees.

vLLM's attention is causal over a request's rows. For a tree that is wrong, so the
metadata of a step may carry :class:`TreeRows`, and the rows of trees are computed by
``clover2::tree_attention``; everything else stays with vLLM's own kernels. Each class
here behaves exactly like its parent when no tree is attached.
"""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_clover2 import ops
from vllm_clover2.integration.compat import patches
from vllm_clover2.ops import KVLayout

_CPU_LAYOUTS = {"vec": KVLayout.VEC, "vec16": KVLayout.VEC, "amx": KVLayout.AMX}


@dataclass(frozen=True)
class TreeRows:
    """The rows of a step that attend along a tree; T requests with R rows in all.

    The same for every layer: where its KV lies, and how far back it sees, are the
    layer's own.
    """

    requests: torch.Tensor | None  # [T] int64 rows of a block table; None: the first T
    prefix_lens: torch.Tensor  # [T] int32 committed positions before the root
    query_starts: torch.Tensor  # [T] int32 index of the root in the step's rows
    row_offsets: torch.Tensor  # [T + 1] int32
    ancestors: torch.Tensor  # [R] int64, bit j: row j is ancestor or self
    covers_batch: bool  # no other row needs attention

    def of(self, block_table: torch.Tensor) -> torch.Tensor:
        """Rows [T, max_blocks] of a step's block table."""
        if self.requests is None:
            return block_table[: len(self.prefix_lens)]
        return block_table[self.requests]


class TreeAttentionMixin:
    """``forward`` of an ``AttentionImpl``, with trees.

    Expects of its parent: ``scale``, ``logits_soft_cap``, that KV was written to the
    cache before ``forward`` (``forward_includes_kv_cache_update = False``), and that
    metadata has the ``block_table`` of the layer's KV group.
    """

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,  # [rows, heads, head_dim]
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,  # like query
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        trees: TreeRows | None = getattr(attn_metadata, "clover2_trees", None)
        if trees is None or not trees.covers_batch:
            super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                *args,
                **kwargs,
            )
        if trees is not None:
            ops.tree_attention(
                query,
                kv_cache,
                kv_layout(layer),
                trees.of(attn_metadata.block_table),
                trees.prefix_lens,
                trees.query_starts,
                trees.row_offsets,
                trees.ancestors,
                self.scale,
                output.view_as(query),
                softcap=float(self.logits_soft_cap or 0.0),
                sliding_window=layer.sliding_window or -1,
            )
        return output


def kv_layout(layer: Any) -> KVLayout:
    """How ``layer.kv_cache`` is laid out.

    Raises:
        NotImplementedError: vLLM picked a CPU layout that our kernels cannot read.

    """
    isa = getattr(layer, "isa", None)  # set by vLLM's CPU backend only
    if isa is None:
        return KVLayout.STRIDED
    if isa not in _CPU_LAYOUTS:
        raise NotImplementedError(
            f"clover2 trees read the KV layouts {sorted(_CPU_LAYOUTS)} of vLLM's CPU "
            f'backend, this processor uses {isa!r}; set "tree": "chain".'
        )
    return _CPU_LAYOUTS[isa]


def register_tree_backends() -> None:
    """Override vLLM's backends in this process by those that understand trees.

    Called by our workers before the model is built; processes without ``clover2``
    keep the stock classes. The CPU platform ignores backend selection, and on CUDA
    FLASH_ATTN is the default, hence overriding instead of registering ``CUSTOM``.
    """
    if current_platform.is_cpu():
        register_backend(
            AttentionBackendEnum.CPU_ATTN,
            "vllm_clover2.integration.attention_cpu.TreeCPUAttentionBackend",
        )
    else:
        module = "vllm_clover2.integration.attention_cuda"
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, f"{module}.TreeFlashAttentionBackend"
        )
        register_backend(
            AttentionBackendEnum.TRITON_ATTN, f"{module}.TreeTritonAttentionBackend"
        )
    patches.forget_selected_backends()


def understands_trees(backend: type[AttentionBackend]) -> bool:
    """Whether rows of trees may be sent to ``backend``."""
    return issubclass(backend.get_impl_cls(), TreeAttentionMixin)
