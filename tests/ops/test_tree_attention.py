# SPDX-License-Identifier: Apache-2.0
"""Tree attention against dense attention in float64 over the original tensors."""

from dataclasses import dataclass

import pytest
import torch
from paging import PagedRequests, page_requests, random_batch

from vllm_clover2.ops import KVLayout
from vllm_clover2.tree import TreeBatch

# Largest absolute error of outputs of size 1: the dtype's rounding of the output, and
# in AMX the rounding of the probabilities to bf16 as well.
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
STORAGES = [
    (KVLayout.STRIDED, torch.float32),
    (KVLayout.STRIDED, torch.bfloat16),
    (KVLayout.VEC, torch.float32),
    (KVLayout.VEC, torch.bfloat16),
    (KVLayout.VEC, torch.float16),
    (KVLayout.AMX, torch.bfloat16),
]
PREFIXES = [0, 1, 31, 32, 33, 127, 200]
ROWS = [7, 1, 64, 2, 26, 9, 64]


@dataclass(frozen=True)
class Sizes:
    heads: int = 9
    kv_heads: int = 3
    dim: int = 64
    block_size: int = 64


@dataclass
class Case:
    paged: PagedRequests
    trees: TreeBatch
    query: torch.Tensor
    query_starts: torch.Tensor
    prefixes: list[int]
    layout: KVLayout

    def arguments(self, out: torch.Tensor, **changes) -> dict:
        return {
            "query": self.query,
            "kv_cache": self.paged.cache,
            "layout": int(self.layout),
            "block_table": self.paged.block_table,
            "prefix_lens": torch.tensor(self.prefixes, dtype=torch.int32),
            "query_starts": self.query_starts,
            "row_offsets": self.trees.row_offsets,
            "ancestors": self.trees.ancestors,
            "scale": self.query.shape[2] ** -0.5,
            "softcap": 0.0,
            "sliding_window": -1,
            "out": out,
        } | changes


def make_case(
    layout: KVLayout,
    dtype: torch.dtype,
    sizes: Sizes,
    prefixes: list[int] = PREFIXES,
    rows: list[int] = ROWS,
) -> Case:
    generator = torch.Generator().manual_seed(len(prefixes) + sizes.dim)
    lengths = [prefix + count for prefix, count in zip(prefixes, rows)]
    paged = page_requests(
        lengths, sizes.kv_heads, sizes.dim, sizes.block_size, layout, dtype, generator
    )
    trees = random_batch(rows, generator)
    # Three other tokens (a prefill's, say) stand before every tree's.
    gaps = 3 * torch.arange(1, len(rows) + 1, dtype=torch.int32)
    tokens = trees.num_rows + 3 * len(rows)
    query = torch.randn(tokens, sizes.heads, sizes.dim, generator=generator)
    starts = trees.row_offsets[:-1] + gaps
    return Case(paged, trees, query.to(dtype), starts, prefixes, layout)


def dense(case: Case, softcap: float = 0.0, window: int = -1) -> torch.Tensor:
    """Attention row by row, head by head, from the definition."""
    out = torch.full_like(case.query, 77, dtype=torch.float64)
    heads, dim = case.query.shape[1:]
    for request, prefix in enumerate(case.prefixes):
        first, end = case.trees.row_offsets[request : request + 2].tolist()
        keys = (
            case.paged.keys[request]
            .double()
            .repeat_interleave(heads // case.paged.cache.shape[1], dim=1)
        )
        values = (
            case.paged.values[request]
            .double()
            .repeat_interleave(heads // case.paged.cache.shape[1], dim=1)
        )
        for row in range(end - first):
            path = []
            node = row
            while node >= 0:
                path.insert(0, node)
                node = int(case.trees.parents[first + node])
            # In sequence order: the prefix, then the path.
            seen = list(range(prefix)) + [prefix + node for node in path]
            if window >= 0:
                seen = seen[-window:]
            token = int(case.query_starts[request]) + row
            scores = (
                torch.einsum("hd,khd->hk", case.query[token].double(), keys[seen])
                / dim**0.5
            )
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            out[token] = torch.einsum("hk,khd->hd", scores.softmax(-1), values[seen])
    return out


def check(run_op, case: Case, softcap: float = 0.0, window: int = -1) -> None:
    out = torch.full_like(case.query, 77)
    arguments = case.arguments(out, softcap=softcap, sliding_window=window)
    run_op("tree_attention", **arguments)
    expected = dense(case, softcap, window)
    error = (out.double() - expected).abs().max()
    assert error < TOLERANCE[out.dtype], float(error)
    untouched = expected[:, 0, 0] == 77
    assert torch.all(out[untouched] == 77)


@pytest.mark.parametrize(("layout", "dtype"), STORAGES)
def test_layouts_and_dtypes(run_op, layout, dtype) -> None:
    check(run_op, make_case(layout, dtype, Sizes()))


@pytest.mark.parametrize("block_size", [32, 96, 128])
@pytest.mark.parametrize(("layout", "dtype"), STORAGES[2::3])
def test_block_sizes(run_op, layout, dtype, block_size) -> None:
    check(run_op, make_case(layout, dtype, Sizes(block_size=block_size)))


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(1, 1), (4, 4), (8, 1), (6, 3), (40, 1), (14, 2)]
)
@pytest.mark.parametrize(("layout", "dtype"), STORAGES[2::3])
def test_head_ratios(run_op, layout, dtype, heads, kv_heads) -> None:
    sizes = Sizes(heads=heads, kv_heads=kv_heads, dim=32, block_size=32)
    check(run_op, make_case(layout, dtype, sizes, [0, 70], [11, 5]))


@pytest.mark.parametrize("dim", [32, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("layout", "dtype"), STORAGES[1:])
def test_head_sizes(run_op, layout, dtype, dim) -> None:
    if layout == KVLayout.AMX and dim % 32:
        pytest.skip("vLLM stores such heads in layout VEC")
    sizes = Sizes(heads=2, kv_heads=1, dim=dim, block_size=32)
    check(run_op, make_case(layout, dtype, sizes, [0, 45], [4, 13]))


@pytest.mark.parametrize(("layout", "dtype"), STORAGES)
def test_long_prefix(run_op, layout, dtype) -> None:
    """4,000 tokens, for one lone request: its keys are divided between threads."""
    sizes = Sizes(heads=2, kv_heads=1, block_size=128)
    check(run_op, make_case(layout, dtype, sizes, [4000], [9]))


@pytest.mark.parametrize(("layout", "dtype"), STORAGES[2::3])
def test_several_rounds_of_online_softmax(run_op, layout, dtype) -> None:
    """Longer than the logits that are kept at a time (8,192 and more)."""
    sizes = Sizes(heads=1, kv_heads=1, block_size=128)
    check(run_op, make_case(layout, dtype, sizes, [17000, 40], [3, 2]))


@pytest.mark.parametrize("window", [1, 3, 40, 1000])
@pytest.mark.parametrize(("layout", "dtype"), STORAGES[2::3])
def test_sliding_window(run_op, layout, dtype, window) -> None:
    check(run_op, make_case(layout, dtype, Sizes()), window=window)


@pytest.mark.parametrize("window", [1, 40])
@pytest.mark.parametrize(("layout", "dtype"), STORAGES)
def test_blocks_outside_the_window_are_not_read(run_op, layout, dtype, window) -> None:
    """vLLM gives them to other requests."""
    case = make_case(layout, dtype, Sizes(block_size=32), [200, 33, 31], [26, 5, 3])
    for request, prefix in enumerate(case.prefixes):
        left = max(prefix + 1 - window, 0) // 32
        case.paged.cache[case.paged.block_table[request, :left].long()] = torch.nan
    check(run_op, case, window=window)


@pytest.mark.parametrize(("layout", "dtype"), STORAGES[2::3])
def test_soft_cap(run_op, layout, dtype) -> None:
    check(run_op, make_case(layout, dtype, Sizes()), softcap=2.5)


@pytest.mark.parametrize("layout", list(KVLayout), ids=lambda layout: layout.name)
def test_no_requests(run_op, layout) -> None:
    case = make_case(layout, torch.bfloat16, Sizes(), [5], [2])
    out = torch.full_like(case.query, 77)
    empty = {
        "prefix_lens": torch.zeros(0, dtype=torch.int32),
        "query_starts": torch.zeros(0, dtype=torch.int32),
        "row_offsets": torch.zeros(1, dtype=torch.int32),
        "block_table": case.paged.block_table[:0],
        "ancestors": case.trees.ancestors[:0],
    }
    run_op("tree_attention", **case.arguments(out, **empty))
    assert torch.all(out == 77)


def test_strided_query_and_out(run_op) -> None:
    """Rows of a fused qkv tensor, and an output with other columns between."""
    case = make_case(KVLayout.VEC, torch.float32, Sizes())
    wide = torch.randn(len(case.query), 15, 64)
    wide[:, :9] = case.query
    case.query = wide[:, :9]
    out = torch.full((len(case.query), 12, 64), 77.0)
    run_op("tree_attention", **case.arguments(out[:, :9]))
    error = (out[:, :9].double() - dense(case)).abs().max()
    assert error < TOLERANCE[torch.float32]
    assert torch.all(out[:, 9:] == 77)


def test_unused_memory_does_not_matter(run_op) -> None:
    """NaN in cache slots and rows that no tree row may see."""
    case = make_case(KVLayout.VEC, torch.float32, Sizes(), [40], [5])
    poisoned = case.paged.cache.clone()
    used = case.paged.slots(0, torch.arange(45)) // 64
    others = [b for b in range(len(poisoned)) if b not in used.tolist()]
    poisoned[others] = torch.nan
    # Behind the last row, in the tree's own block.
    keys, values = poisoned.view(len(poisoned), 3, 2, 64 * 64).unbind(2)
    block = int(used[0])
    keys.view(-1, 3, 64, 64)[block, :, :, 45:] = torch.nan
    values.view(-1, 3, 64, 64)[block, :, 45:] = torch.nan
    case.paged.cache = poisoned
    check(run_op, case)
