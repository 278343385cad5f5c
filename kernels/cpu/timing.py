# SPDX-License-Identifier: Apache-2.0
"""Times the CPU ops; with vLLM installed also its own attention on the same rows.

    python kernels/cpu/timing.py [--threads 2] [--repeats 200]

vLLM can only verify a chain, so its column is a chain of as many rows; both read the
same cache. Printed are medians, in milliseconds per call, that is for one layer.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from vllm_clover2 import ops
from vllm_clover2.model.layers import RecurrentHead
from vllm_clover2.ops import KVLayout
from vllm_clover2.tree import TreeBatch, paper_tree

HEADS, KV_HEADS, DIM, BLOCK, LAYERS = 9, 3, 64, 128, 30  # SmolLM2-135M
VOCABULARY, DRAFT_VOCABULARY = 49_152, 8192
STORAGES = [
    (KVLayout.VEC, "vec", torch.float32),
    (KVLayout.VEC, "vec", torch.bfloat16),
    (KVLayout.AMX, "amx", torch.bfloat16),
]


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call after a few to warm up."""
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) * 1e3


def stock_attention(
    query: torch.Tensor,  # [requests * rows, HEADS, DIM]
    cache: torch.Tensor,
    table: torch.Tensor,
    length: int,
    isa: str,
) -> Callable[[], object] | None:
    """vLLM's attention for the same rows as chains, None without vLLM for the CPU."""
    try:
        import vllm._custom_ops as stock
        from vllm.platforms import current_platform
    except ImportError:
        return None
    if not current_platform.is_cpu():
        return None
    current_platform.import_kernels()
    requests = len(table)
    starts = torch.arange(requests + 1, dtype=torch.int32) * (len(query) // requests)
    lengths = torch.full((requests,), length, dtype=torch.int32)
    keys, values = cache.view(len(cache), KV_HEADS, 2 * BLOCK, DIM).chunk(2, dim=2)
    plan = stock.cpu_attn_get_scheduler_metadata(
        requests,
        HEADS,
        KV_HEADS,
        DIM,
        lengths,
        query.dtype,
        starts,
        True,
        -1,
        isa,
        True,
    )
    out = torch.empty_like(query)
    return lambda: stock.cpu_attention_with_kv_cache(
        query, keys, values, out, starts, lengths, DIM**-0.5, True, None, -1, table,
        0.0, plan, None,
    )  # fmt: skip


def time_attention(requests: int, prefix: int, repeats: int) -> None:
    """One line per layout and dtype."""
    shape = paper_tree()
    trees = TreeBatch.from_lists(
        [[1] * shape.num_nodes] * requests, [[*shape.parents]] * requests
    )
    length = prefix + shape.num_nodes + 1
    blocks = -(-length // BLOCK)
    table = torch.randperm(requests * blocks).view(requests, blocks).int()
    prefixes = torch.full((requests,), prefix, dtype=torch.int32)
    starts = trees.row_offsets[:-1].clone()
    for layout, isa, dtype in STORAGES:
        cache = torch.randn(requests * blocks, KV_HEADS, BLOCK, 2 * DIM).to(dtype)
        query = torch.randn(trees.num_rows, HEADS, DIM).to(dtype)
        out = torch.empty_like(query)

        def ours(cache=cache, query=query, out=out, layout=layout) -> None:
            ops.tree_attention(
                query, cache, layout, table, prefixes, starts, trees.row_offsets,
                trees.ancestors, DIM**-0.5, out,
            )  # fmt: skip

        # First ours: it asks Linux for the use of AMX, which vLLM does elsewhere.
        own = median_ms(ours, repeats)
        stock = stock_attention(query, cache, table, length, isa)
        against = f"{median_ms(stock, repeats):.3f}" if stock else "-"
        print(
            f"tree_attention  {requests:3} x {shape.num_nodes + 1} rows, prefix "
            f"{prefix:5}, {layout.name:4} {str(dtype)[6:]:9}"
            f"{own:8.3f} ms   vLLM's chain {against:>8} ms"
        )


def time_commit(requests: int, repeats: int) -> None:
    """Three accepted tokens of every request, all layers in one call."""
    table = torch.arange(4 * requests, dtype=torch.int32).view(requests, 4)
    caches = [
        torch.zeros(4 * requests, KV_HEADS, BLOCK, 2 * DIM, dtype=torch.bfloat16)
        for _ in range(LAYERS)
    ]
    prefixes = torch.full((requests,), 200, dtype=torch.int32)
    paths = torch.tensor([[2, 7, 15]] * requests, dtype=torch.int32)
    lengths = torch.full((requests,), 3, dtype=torch.int32)
    for layout in (KVLayout.VEC, KVLayout.AMX):

        def commit(layout=layout) -> None:
            ops.commit_kv(caches, layout, table, prefixes, paths, lengths)

        print(
            f"commit_kv       {requests:3} x 3 tokens, {LAYERS} layers, "
            f"{layout.name:4} bfloat16 {median_ms(commit, repeats):16.3f} ms"
        )


def time_context(requests: int, length: int, repeats: int) -> None:
    """Random texts in which tokens are about as frequent as in written ones."""
    frequencies = 1 / torch.arange(1.0, VOCABULARY + 1)  # Zipf's law
    tokens = torch.multinomial(frequencies, requests * length, replacement=True)
    history = tokens.view(requests, length).int()
    rows = torch.arange(requests, dtype=torch.int32)
    lengths = torch.full((requests,), length, dtype=torch.int32)

    def find() -> None:
        ops.context_nodes(
            history, rows, lengths, min_match=2, max_match=16, max_places=16,
            max_depth=10, max_nodes=32,
        )  # fmt: skip

    print(
        f"context_nodes   {requests:3} x {length:6} tokens "
        f"{median_ms(find, repeats):34.3f} ms"
    )


def time_growth(rows: int, repeats: int) -> None:
    """One level of growing trees: a recurrent step, and scores of its outputs."""
    head = RecurrentHead(HEADS * DIM, HEADS, 1e-5).bfloat16().requires_grad_(False)
    head.quantize()
    output = torch.randn(DRAFT_VOCABULARY, HEADS * DIM)
    rounded = ops.pack_int8(output)
    output = output.bfloat16()
    state = torch.randn(rows, HEADS * DIM).bfloat16()
    out = torch.randn_like(state)
    logits = ops.int8_product(out, rounded)
    step = median_ms(lambda: head.advance(state, state), repeats)
    product = median_ms(lambda: ops.int8_product(out, rounded), repeats)
    plain = median_ms(lambda: out @ output.T, repeats)
    top_k = median_ms(lambda: ops.top_k_log_probs(logits, 8), repeats)
    print(
        f"growth          {rows:3} rows: recurrent_step {step:.3f} ms, int8_product "
        f"{product:.3f} ms (torch in bf16 {plain:.3f} ms), top_k_log_probs "
        f"{top_k:.3f} ms"
    )


def main() -> None:
    """Runs all measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} threads, ops: {ops.backend('cpu')}")
    for requests, prefix in ((1, 500), (8, 500), (1, 4000)):
        time_attention(requests, prefix, options.repeats)
    for requests in (1, 8):
        time_commit(requests, options.repeats)
    for requests, length in ((1, 2_000), (8, 2_000), (1, 32_768), (1, 131_072)):
        time_context(requests, length, options.repeats)
    for rows in (1, 8, 64):
        time_growth(rows, options.repeats)


if __name__ == "__main__":
    main()
