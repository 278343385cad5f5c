# SPDX-License-Identifier: Apache-2.0
"""How keys and values of one token lie in a layer's paged cache.

Everything that has to know a layout reads and writes tokens through
``read_tokens`` and ``write_tokens``; the C++ side has the same formulas in
``kernels/common/kv_layout.h``.
"""

from enum import IntEnum

import torch

# AMX tiles hold 16 rows of 16 32-bit words; a word is a pair of 16-bit elements.
AMX_TILE_ROWS = 16
AMX_PAIR = 2


class KVLayout(IntEnum):
    """Layout of one layer's cache, logically [blocks, kv_heads, block_size, 2 * D].

    ``STRIDED``: K is ``[..., :D]`` and V is ``[..., D:]``, any strides (CUDA).
    ``VEC`` and ``AMX``: what vLLM's CPU backend writes. The tensor is contiguous, and
    the ``block_size * 2 * D`` elements of a (block, head) are regrouped: first K, then
    V. ``VEC``: K is column-major [D, block_size], V row-major [block_size, D].
    ``AMX``: both are stored as the tiles that the matrix unit loads.
    """

    STRIDED = 0
    VEC = 1
    AMX = 2


def head_size(kv_cache: torch.Tensor) -> int:
    """D of a cache tensor [blocks, kv_heads, block_size, 2 * D]."""
    if kv_cache.dim() != 4 or kv_cache.shape[3] % 2:
        raise ValueError(
            "a KV cache must be [blocks, kv_heads, block_size, 2 * head_size], found "
            f"shape {tuple(kv_cache.shape)}"
        )
    return kv_cache.shape[3] // 2


def _token_views(
    kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * D]
    layout: KVLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views [blocks, kv_heads, group, within group, ..] of the cache.

    A token at offset o is at (o // size, o % size), ``size`` = the view's fourth
    dimension; the remaining dimensions flatten to the head size.
    """
    blocks, heads, block_size, _ = kv_cache.shape
    dim = head_size(kv_cache)
    if layout == KVLayout.STRIDED:
        return kv_cache[..., :dim].unsqueeze(3), kv_cache[..., dim:].unsqueeze(3)
    if not kv_cache.is_contiguous():
        raise ValueError(
            f"a {layout.name} cache must be contiguous, found strides "
            f"{kv_cache.stride()}; pass the layer's cache tensor itself, not a view"
        )
    keys, values = kv_cache.view(blocks, heads, 2, block_size * dim).unbind(2)
    if layout == KVLayout.VEC:
        keys = keys.unflatten(-1, (dim, block_size)).transpose(2, 3)
        values = values.unflatten(-1, (block_size, dim))
        return keys.unsqueeze(3), values.unsqueeze(3)
    if block_size % AMX_TILE_ROWS or dim % AMX_TILE_ROWS:
        raise ValueError(
            "the AMX layout needs block and head sizes that are multiples of "
            f"{AMX_TILE_ROWS}, found block size {block_size}, head size {dim}"
        )
    keys = keys.unflatten(
        -1, (block_size // AMX_TILE_ROWS, dim // AMX_PAIR, AMX_TILE_ROWS, AMX_PAIR)
    )
    values = values.unflatten(
        -1, (dim // AMX_TILE_ROWS, block_size // AMX_PAIR, AMX_TILE_ROWS, AMX_PAIR)
    )
    return keys.permute(0, 1, 2, 4, 3, 5), values.permute(0, 1, 3, 5, 2, 4)


def read_tokens(
    kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * D]
    layout: KVLayout,
    slots: torch.Tensor,  # [n] int64, block * block_size + offset
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of the keys and values [n, kv_heads, D] stored at ``slots``."""
    rows = []
    block_size = kv_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    for view in _token_views(kv_cache, layout):
        size = view.shape[3]
        rows.append(view[block, :, offset // size, offset % size].flatten(2))
    return rows[0], rows[1]


def write_tokens(
    kv_cache: torch.Tensor,  # [blocks, kv_heads, block_size, 2 * D], changed
    layout: KVLayout,
    slots: torch.Tensor,  # [n] int64, distinct
    keys: torch.Tensor,  # [n, kv_heads, D]
    values: torch.Tensor,  # [n, kv_heads, D]
) -> None:
    """Stores keys and values at ``slots``."""
    block_size = kv_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    views = _token_views(kv_cache, layout)
    for view, rows in zip(views, (keys, values), strict=True):
        size = view.shape[3]
        shape = rows.shape[:2] + view.shape[4:]
        view[block, :, offset // size, offset % size] = rows.reshape(shape)
