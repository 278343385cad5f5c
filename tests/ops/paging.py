# SPDX-License-Identifier: Apache-2.0
"""Paged caches with known contents, and random trees."""

from dataclasses import dataclass

import torch

from vllm_clover2.ops import KVLayout
from vllm_clover2.ops.layout import write_tokens
from vllm_clover2.tree import TreeBatch


@dataclass
class PagedRequests:
    """Requests whose keys and values lie in shuffled pages; the rest is noise."""

    keys: list[torch.Tensor]  # per request [length, kv_heads, D]
    values: list[torch.Tensor]
    cache: torch.Tensor  # [blocks, kv_heads, block_size, 2 * D]
    block_table: torch.Tensor  # [R, max_blocks] int32

    def slots(self, request: int, positions: torch.Tensor) -> torch.Tensor:
        block_size = self.cache.shape[2]
        blocks = self.block_table[request].long()[positions // block_size]
        return blocks * block_size + positions % block_size


def page_requests(
    lengths: list[int],
    kv_heads: int,
    dim: int,
    block_size: int,
    layout: KVLayout,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> PagedRequests:
    """Random keys and values of requests, stored in `layout`."""

    def noise(tokens: int) -> torch.Tensor:
        values = torch.randn(tokens, kv_heads, dim, generator=generator)
        if dtype == torch.uint8:
            return torch.randint(0, 256, values.shape, generator=generator).to(dtype)
        return values.to(dtype)

    max_blocks = max([-(-length // block_size) for length in lengths], default=0) + 1
    blocks = len(lengths) * max_blocks + 2
    shape = (blocks, kv_heads, block_size, 2 * dim)
    if layout == KVLayout.STRIDED:
        # Neither contiguous nor with blocks outermost, as some CUDA backends have it.
        cache = torch.zeros(block_size, blocks, 2 * dim, kv_heads, dtype=dtype)
        cache = cache.permute(1, 3, 0, 2)
    else:
        cache = torch.zeros(shape, dtype=dtype)
    everywhere = torch.arange(blocks * block_size)
    count = everywhere.numel()
    write_tokens(cache, layout, everywhere, noise(count), noise(count))
    order = torch.randperm(blocks, generator=generator)[: len(lengths) * max_blocks]
    table = order.view(len(lengths), max_blocks).int()
    paged = PagedRequests([], [], cache, table)
    for request, length in enumerate(lengths):
        paged.keys.append(noise(length))
        paged.values.append(noise(length))
        slots = paged.slots(request, torch.arange(length))
        write_tokens(cache, layout, slots, paged.keys[-1], paged.values[-1])
    return paged


def random_batch(rows: list[int], generator: torch.Generator) -> TreeBatch:
    """Random trees of given numbers of rows, each row below one of the six before."""
    parents = [
        [
            int(torch.randint(max(0, row - 6), row, (), generator=generator))
            for row in range(1, count)
        ]
        for count in rows
    ]
    return TreeBatch.from_lists([[1] * len(own) for own in parents], parents)
