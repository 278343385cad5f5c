# SPDX-License-Identifier: Apache-2.0
"""Commits against moving tokens in a dictionary."""

import pytest
import torch
from paging import page_requests

from vllm_clover2.ops import KVLayout
from vllm_clover2.ops.layout import read_tokens

STORAGES = [
    (KVLayout.STRIDED, torch.float32),
    (KVLayout.STRIDED, torch.bfloat16),
    (KVLayout.VEC, torch.float32),
    (KVLayout.VEC, torch.float16),
    (KVLayout.VEC, torch.uint8),  # an fp8 cache
    (KVLayout.AMX, torch.bfloat16),
    (KVLayout.AMX, torch.uint8),
]
PREFIXES = [0, 30, 31, 64, 100]
# Accepted rows: none, nothing to move, overlapping, far apart, across blocks.
PATHS = [[], [1, 2, 3], [2, 3, 4], [5, 17, 40], [1, 4, 33, 63]]


def paths_tensor(paths: list[list[int]], max_depth: int) -> torch.Tensor:
    padded = [path + [-1] * (max_depth - len(path)) for path in paths]
    return torch.tensor(padded, dtype=torch.int32).view(len(paths), max_depth)


@pytest.mark.parametrize(
    "paths", [PATHS, [[3, 1, 2], [2, 1], [], [], []]], ids=["trees", "any-order"]
)
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize(("layout", "dtype"), STORAGES)
def test_tokens_move(run_op, layout, dtype, block_size, paths) -> None:
    """All sources are read before any write, even where paths are in no order."""
    generator = torch.Generator().manual_seed(0)
    lengths = [prefix + 64 for prefix in PREFIXES]
    layers = [
        page_requests(lengths, 2, 32, block_size, layout, dtype, generator)
        for _ in range(3)
    ]
    table = layers[0].block_table
    everywhere = torch.arange(layers[0].cache.shape[0] * block_size)
    before = [read_tokens(layer.cache, layout, everywhere) for layer in layers]

    run_op(
        "commit_kv",
        kv_caches=[layer.cache for layer in layers],
        layout=int(layout),
        block_table=table,
        prefix_lens=torch.tensor(PREFIXES, dtype=torch.int32),
        paths=paths_tensor(paths, 5),
        lengths=torch.tensor([len(path) for path in paths], dtype=torch.int32),
    )

    moved = {int(slot): int(slot) for slot in everywhere}
    for request, (prefix, path) in enumerate(zip(PREFIXES, paths)):

        def slot(position: int, request: int = request) -> int:
            block = int(table[request, position // block_size])
            return block * block_size + position % block_size

        for depth, row in enumerate(path, start=1):
            moved[slot(prefix + depth)] = slot(prefix + row)
    source = torch.tensor([moved[int(slot)] for slot in everywhere])
    for layer, (keys, values) in zip(layers, before):
        new_keys, new_values = read_tokens(layer.cache, layout, everywhere)
        assert torch.equal(new_keys, keys[source])
        assert torch.equal(new_values, values[source])


def test_nothing_to_do(run_op) -> None:
    cache = torch.randn(4, 2, 32, 64)
    before = cache.clone()
    empty = torch.zeros(0, dtype=torch.int32)
    common = {"layout": int(KVLayout.VEC), "paths": empty.view(0, 5), "lengths": empty}
    table = torch.zeros(0, 3, dtype=torch.int32)
    run_op(
        "commit_kv", kv_caches=[cache], block_table=table, prefix_lens=empty, **common
    )
    run_op("commit_kv", kv_caches=[], block_table=table, prefix_lens=empty, **common)
    assert torch.equal(cache, before)
