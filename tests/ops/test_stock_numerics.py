# SPDX-License-Identifier: Apache-2.0
"""Bit-equality with vLLM's own attention and linear layers on the CPU.

Attention on caches that vLLM's op wrote: a tree row must get exactly what plain
decoding computes for the same token on the same path: then bf16 text does not depend on
whether a token was speculated.
"""

from dataclasses import dataclass

import pytest
import torch
from paging import random_batch

from vllm_clover2 import ops
from vllm_clover2.ops import KVLayout
from vllm_clover2.ops.layout import read_tokens

vllm_ops = pytest.importorskip("vllm._custom_ops", reason="needs vLLM's CPU build")
platforms = pytest.importorskip("vllm.platforms")
if not platforms.current_platform.is_cpu():
    pytest.skip("compares with vLLM's CPU attention", allow_module_level=True)
platforms.current_platform.import_kernels()

HEADS, KV_HEADS, ROWS, BLOCK = 6, 2, 21, 128
STORAGES = [
    pytest.param("vec", KVLayout.VEC, torch.float32, 64, id="vec-f32"),
    pytest.param("vec", KVLayout.VEC, torch.bfloat16, 64, id="vec-bf16"),
    pytest.param("vec", KVLayout.VEC, torch.float16, 96, id="vec-f16"),
    pytest.param("vec16", KVLayout.VEC, torch.bfloat16, 80, id="vec16-bf16"),
    pytest.param("amx", KVLayout.AMX, torch.bfloat16, 64, id="amx-64"),
    pytest.param("amx", KVLayout.AMX, torch.bfloat16, 128, id="amx-128"),
]


@pytest.fixture(autouse=True)
def two_threads():
    """vLLM divides the keys of a lone request between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def skip_without(isa: str) -> None:
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this processor has no AMX")
    if not torch.cpu._is_avx512_supported():
        pytest.skip("without AVX-512, sums are rounded differently")


@dataclass
class StockCache:
    """One request's keys and values in a cache that vLLM's op writes and reads."""

    keys: torch.Tensor  # [tokens, KV_HEADS, D]
    values: torch.Tensor
    isa: str

    def __post_init__(self) -> None:
        dim = self.keys.shape[2]
        self.blocks = -(-len(self.keys) // BLOCK)
        shape = (self.blocks + 1, KV_HEADS, BLOCK, 2 * dim)
        self.cache = torch.zeros(shape, dtype=self.keys.dtype)
        order = torch.randperm(self.blocks + 1, generator=torch.Generator())
        self.table = order[None, : self.blocks].int()
        halves = self.cache.view(*shape[:2], 2 * BLOCK, dim).chunk(2, dim=2)
        self.key_cache, self.value_cache = halves
        vllm_ops.cpu_attn_reshape_and_cache(
            self.keys, self.values, *halves, self.slots(), self.isa
        )

    def slots(self) -> torch.Tensor:
        positions = torch.arange(len(self.keys))
        return self.table[0].long()[positions // BLOCK] * BLOCK + positions % BLOCK

    def attend(self, query: torch.Tensor, split: bool) -> torch.Tensor:
        """Stock attention of the last tokens' queries [n, HEADS, D]."""
        starts = torch.tensor([0, len(query)], dtype=torch.int32)
        length = torch.tensor([len(self.keys)], dtype=torch.int32)
        dim = query.shape[2]
        plan = vllm_ops.cpu_attn_get_scheduler_metadata(
            1, HEADS, KV_HEADS, dim, length, query.dtype, starts, True, -1,
            self.isa, split,
        )  # fmt: skip
        out = torch.empty_like(query)
        vllm_ops.cpu_attention_with_kv_cache(
            query, self.key_cache, self.value_cache, out, starts, length, dim**-0.5,
            True, None, -1, self.table, 0.0, plan, None,
        )  # fmt: skip
        return out


@dataclass
class Verified:
    """A request of `prefix` tokens and a tree, and our attention's result."""

    query: torch.Tensor  # [ROWS, HEADS, D]
    cache: StockCache
    parents: list[int]
    out: torch.Tensor


def verify(isa, layout, dtype, dim, prefix, chain=False, requests=1) -> Verified:
    generator = torch.Generator().manual_seed(prefix)

    def noise(tokens: int, heads: int, size: float) -> torch.Tensor:
        values = torch.randn(tokens, heads, dim, generator=generator)
        return (values * size).to(dtype)

    cache = StockCache(
        noise(prefix + ROWS, KV_HEADS, 1.5), noise(prefix + ROWS, KV_HEADS, 1.0), isa
    )
    trees = random_batch([ROWS], generator)
    if chain:
        trees.parents.copy_(torch.arange(-1, ROWS - 1))
        trees.ancestors.copy_(2 ** torch.arange(1, ROWS + 1) - 1)
    query = noise(ROWS, HEADS, 1.5)
    out = torch.zeros_like(query)
    # The same request several times: same result, but vLLM would not divide its keys.
    repeated = torch.arange(requests + 1, dtype=torch.int32)
    ops.tree_attention(
        query,
        cache.cache,
        layout,
        cache.table.expand(requests, -1),
        torch.full((requests,), prefix, dtype=torch.int32),
        torch.zeros(requests, dtype=torch.int32),
        repeated * ROWS,
        trees.ancestors.repeat(requests),
        dim**-0.5,
        out,
    )
    return Verified(query, cache, trees.parents.tolist(), out)


def plain(verified: Verified, row: int, prefix: int, split: bool) -> torch.Tensor:
    """What plain decoding computes for a row: its path directly behind the prefix."""
    path = [row]
    while verified.parents[path[0]] >= 0:
        path.insert(0, verified.parents[path[0]])
    tokens = list(range(prefix)) + [prefix + node for node in path]
    source = verified.cache
    alone = StockCache(source.keys[tokens], source.values[tokens], source.isa)
    return alone.attend(verified.query[row : row + 1], split)[0]


@pytest.mark.parametrize("prefix", [0, 7, 31, 100, 480, 505, 900])
@pytest.mark.parametrize(("isa", "layout", "dtype", "dim"), STORAGES)
def test_tree_rows_equal_plain_decoding(isa, layout, dtype, dim, prefix) -> None:
    skip_without(isa)
    verified = verify(isa, layout, dtype, dim, prefix, requests=2)
    for row in range(ROWS):
        expected = plain(verified, row, prefix, split=False)
        assert torch.equal(verified.out[row], expected), row


@pytest.mark.parametrize("prefix", [100, 250, 480, 505, 900])
@pytest.mark.parametrize(
    ("isa", "layout", "dtype", "dim"), [s for s in STORAGES if "16-" not in s.id]
)
def test_lone_request_equals_plain_decoding(isa, layout, dtype, dim, prefix) -> None:
    """With its keys divided between threads, which is vLLM's default."""
    skip_without(isa)
    verified = verify(isa, layout, dtype, dim, prefix)
    for row in range(ROWS):
        expected = plain(verified, row, prefix, split=True)
        assert torch.equal(verified.out[row], expected), row


@pytest.mark.parametrize(("isa", "layout", "dtype", "dim"), STORAGES)
def test_chain_equals_stock_verification(isa, layout, dtype, dim) -> None:
    """All rows of a chain in one call of the stock op."""
    skip_without(isa)
    verified = verify(isa, layout, dtype, dim, 300, chain=True, requests=2)
    assert torch.equal(verified.out, verified.cache.attend(verified.query, split=True))


@pytest.mark.parametrize(("isa", "layout", "dtype", "dim"), STORAGES)
def test_we_read_what_the_stock_op_wrote(isa, layout, dtype, dim) -> None:
    skip_without(isa)
    verified = verify(isa, layout, dtype, dim, 200)
    cache = verified.cache
    keys, values = read_tokens(cache.cache, layout, cache.slots())
    assert torch.equal(keys, cache.keys)
    assert torch.equal(values, cache.values)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("depth", [64, 1000, 1024, 1032, 2752])
@pytest.mark.parametrize("outputs", [16, 333, 576])
def test_linear_layers_equal_stock_ones(outputs, depth, bias) -> None:
    """Where ours serve: `integration.linear_cpu`."""
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("with AVX-512 vLLM's own products serve")
    generator = torch.Generator().manual_seed(depth)
    weight = torch.randn(outputs, depth, generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    stock, packed = vllm_ops.create_onednn_mm(weight.t(), 32), ops.pack_linear(weight)
    for rows in (1, 2, 5, 6, 7, 13, 26, 64, 200):
        x = torch.randn(rows, depth, generator=generator)
        expected = vllm_ops.onednn_mm(stock, x, added)
        assert torch.equal(ops.packed_linear(x, packed, added, outputs), expected)
