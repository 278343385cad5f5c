# SPDX-License-Identifier: Apache-2.0
"""Times the CUDA ops beside the copy bandwidth and other ways to do the same.

Every measurement captures one pass over several input sets, together larger than the
L2 cache, in a CUDA graph and takes the median of its replays: launch gaps and cached
inputs stay out of the numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from random_cases import ancestor_words, context_case, random_parents

REPLAYS = 20
# Input sets together fill the L2 cache this many times over, within a memory budget.
L2_TIMES = 4
MAX_SET_BYTES = 8 << 30
COPY_BYTES = 2 << 30
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Workload:
    """One verify step of one layer."""

    requests: int
    prefix: int
    rows: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Short, for the table."""
        return (
            f"{self.requests} x {self.prefix} + {self.rows} rows, heads "
            f"{self.heads}/{self.kv_heads} x {self.dim} {str(self.dtype)[6:]}"
        )

    @property
    def bytes(self) -> int:
        """The least that must move: visible K and V, queries and output, once."""
        kv = self.requests * (self.prefix + self.rows) * self.kv_heads * 2
        queries = self.requests * self.rows * self.heads * 2
        return (kv + queries) * self.dim * self.dtype.itemsize


WORKLOADS = [
    Workload(1, 1024, 26),
    Workload(1, 8192, 26),
    Workload(1, 65536, 26),
    Workload(8, 1024, 26),
    Workload(8, 8192, 26),
    Workload(8, 8192, 6),
    Workload(8, 8192, 64),
    Workload(32, 4096, 26),
    Workload(64, 2048, 26),
    Workload(64, 8192, 26),
    Workload(8, 8192, 26, heads=64, kv_heads=8),
    Workload(8, 8192, 26, heads=16, kv_heads=16),
    Workload(8, 8192, 26, heads=9, kv_heads=3, dim=64),
    Workload(8, 8192, 26, heads=16, kv_heads=8, dim=256),
    Workload(8, 8192, 26, dtype=torch.float16),
    Workload(8, 2048, 26, dtype=torch.float32),
]


@dataclass
class Timing:
    """What one way of doing one thing took."""

    what: str
    how: str
    microseconds: float | None  # None: it could not run, see note
    gigabytes_per_second: float | None = None
    of_copy: float | None = None  # fraction of the copy bandwidth
    note: str = ""


def time_calls(calls: list[Callable[[], object]]) -> float:
    """Median microseconds per call over graph replays of all ``calls`` in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2] * 2:  # compiles and allocates whatever there is
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return median(times[3:])


def copy_bandwidth() -> float:
    """Bytes read plus written per second by a large device-to-device copy, in GB/s."""
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / time_calls([lambda: target.copy_(source)]) / 1e3


def num_sets(bytes_per_set: int) -> int:
    """How many input sets keep the L2 cache from helping."""
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    wanted = -(-L2_TIMES * l2 // bytes_per_set)
    return max(1, min(wanted, MAX_SET_BYTES // bytes_per_set, 64))


@dataclass
class Inputs:
    """Paged and dense copies of one workload's tensors."""

    query: torch.Tensor  # [R * rows, heads, D]
    cache: torch.Tensor  # [blocks, kv_heads, BLOCK_SIZE, 2 * D]
    block_table: torch.Tensor  # [R, blocks per request] int32
    prefix_lens: torch.Tensor  # [R] int32
    query_starts: torch.Tensor  # [R] int32
    row_offsets: torch.Tensor  # [R + 1] int32
    ancestors: torch.Tensor  # [R * rows] int64
    visible: torch.Tensor  # [rows, rows] bool, one tree for all requests
    out: torch.Tensor

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V [R, kv_heads, keys, D] of all keys, gathered from the pages."""
        pages = self.cache[self.block_table.long()]  # [R, blocks, heads, size, 2D]
        rows = pages.transpose(1, 2).flatten(2, 3)
        keys = int(self.prefix_lens[0]) + self.visible.shape[0]
        dim = self.query.shape[2]
        rows = rows[:, :, :keys].contiguous()
        return rows[..., :dim].contiguous(), rows[..., dim:].contiguous()


def make_inputs(work: Workload, seed: int) -> Inputs:
    """Random tensors on the GPU; blocks lie in random order."""
    generator = torch.Generator().manual_seed(seed)
    torch.cuda.manual_seed(seed)
    per_request = -(-(work.prefix + work.rows) // BLOCK_SIZE)
    blocks = work.requests * per_request
    table = torch.randperm(blocks, generator=generator).int()
    words = ancestor_words(random_parents(work.rows, generator))
    ancestors = torch.tensor(words)
    starts = torch.arange(work.requests + 1).int() * work.rows
    # vLLM's layout on CUDA: [blocks, block_size, kv_heads, 2 * D] in memory.
    cache = torch.randn(
        blocks, BLOCK_SIZE, work.kv_heads, 2 * work.dim, device="cuda"
    ).to(work.dtype)
    tokens = work.requests * work.rows
    query = torch.randn(tokens, work.heads, work.dim, device="cuda").to(work.dtype)
    return Inputs(
        query,
        cache.transpose(1, 2),
        table.view(work.requests, per_request).cuda(),
        torch.full((work.requests,), work.prefix, dtype=torch.int32).cuda(),
        starts[:-1].cuda(),
        starts.cuda(),
        ancestors.repeat(work.requests).cuda(),
        (ancestors[:, None] >> torch.arange(work.rows) & 1).bool().cuda(),
        torch.empty_like(query),
    )


def run_ours(inputs: Inputs) -> None:
    """clover2::tree_attention."""
    torch.ops.clover2.tree_attention(
        inputs.query, inputs.cache, 0, inputs.block_table, inputs.prefix_lens,
        inputs.query_starts, inputs.row_offsets, inputs.ancestors,
        inputs.query.shape[2] ** -0.5, 0.0, -1, inputs.out,
    )  # fmt: skip


def sdpa(work: Workload, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """Masked SDPA over dense K and V; the heads of a group count as rows."""
    keys, values = inputs.dense()
    group = work.heads // work.kv_heads
    query = (
        inputs.query.view(work.requests, work.rows, work.kv_heads, group, work.dim)
        .permute(0, 2, 1, 3, 4)
        .reshape(work.requests, work.kv_heads, work.rows * group, work.dim)
        .contiguous()
    )
    prefix = inputs.visible.new_ones(work.rows, work.prefix)
    mask = torch.cat((prefix, inputs.visible), dim=1).repeat_interleave(group, dim=0)
    return lambda: torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask
    )


def xformers_tree(work: Workload, inputs: Inputs) -> Callable[[], torch.Tensor]:
    """The tree attention of xformers, if installed, over dense K and V."""
    from xformers.ops import tree_attention
    from xformers.ops.fmha import triton_splitk
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask

    group = work.heads // work.kv_heads
    grouped = (work.requests, -1, work.kv_heads, group, work.dim)
    keys, values = (
        part.transpose(1, 2).contiguous().unsqueeze(3).expand(grouped)
        for part in inputs.dense()
    )
    bias = BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[work.rows] * work.requests,
        kv_seqlen=[work.prefix] * work.requests,
        kv_padding=work.prefix,
    )
    cache_keys, cache_values = (
        part[:, : work.prefix].select(3, 0).contiguous().unsqueeze(3).expand(grouped)
        for part in (keys, values)
    )
    tree_keys, tree_values = (part[:, work.prefix :] for part in (keys, values))
    tree_bias = torch.zeros(
        inputs.visible.shape, dtype=work.dtype, device="cuda"
    ).masked_fill(~inputs.visible, -torch.inf)
    query = inputs.query.view(grouped)
    return lambda: tree_attention.tree_attention(
        query, tree_keys, tree_values, cache_keys, cache_values, tree_bias, bias,
        prefix_op=triton_splitk.FwOp,
    )  # fmt: skip


def time_attention(work: Workload, copy: float) -> list[Timing]:
    """Our op, SDPA and xformers on one workload; others that fail say why."""
    sets = [make_inputs(work, seed) for seed in range(num_sets(work.bytes))]
    ways: dict[str, Callable[[], list[Callable[[], object]]]] = {
        "clover2": lambda: [lambda one=one: run_ours(one) for one in sets],
        "sdpa": lambda: [sdpa(work, one) for one in sets],
        "xformers": lambda: [xformers_tree(work, one) for one in sets],
    }
    results = []
    for how, make in ways.items():
        try:
            taken = time_calls(make())
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            results.append(Timing(work.name, how, None, note=reason[:70]))
            torch.cuda.synchronize()
            continue
        rate = work.bytes / taken / 1e3
        results.append(Timing(work.name, how, taken, rate, rate / copy))
    return results


def time_commit(requests: int, layers: int, accepted: int, copy: float) -> Timing:
    """commit_kv of 8 heads x 128 bf16 with every accepted row out of place."""
    kv_heads, dim, prefix = 8, 128, 1000
    per_request = -(-(prefix + 64) // BLOCK_SIZE)
    shape = (requests * per_request, BLOCK_SIZE, kv_heads, 2 * dim)
    caches = [
        torch.randn(shape, device="cuda").bfloat16().transpose(1, 2)
        for _ in range(layers)
    ]
    table = torch.randperm(requests * per_request).int().view(requests, per_request)
    path = torch.arange(1, accepted + 1).int() * 5
    arguments = (
        table.cuda(),
        torch.full((requests,), prefix, dtype=torch.int32).cuda(),
        path.repeat(requests, 1).cuda(),
        torch.full((requests,), accepted, dtype=torch.int32).cuda(),
    )
    taken = time_calls([lambda: torch.ops.clover2.commit_kv(caches, 0, *arguments)])
    rate = 2 * requests * layers * accepted * kv_heads * 2 * dim * 2 / taken / 1e3
    name = f"{requests} requests, {layers} layers, {accepted} rows"
    return Timing(f"commit_kv {name}", "clover2", taken, rate, rate / copy)


def time_accept(requests: int) -> Timing:
    """tree_accept of trees whose chain of 6 rows is accepted in full."""
    rows = 26
    tokens = torch.ones(requests * rows, dtype=torch.int64).cuda()
    parents = torch.tensor([-1, 0, 1, 2, 3, 4, 5] + [0] * (rows - 7)).int()
    offsets = torch.arange(requests + 1).int() * rows
    arguments = (tokens, tokens, parents.repeat(requests).cuda(), offsets.cuda(), 6)
    taken = time_calls([lambda: torch.ops.clover2.tree_accept(*arguments)])
    return Timing(f"tree_accept {requests} requests, {rows} rows", "clover2", taken)


def time_context(requests: int, length: int) -> Timing:
    """context_nodes of texts in which 20 places match."""
    case = context_case([length] * requests, 50000, copied=20).to("cuda")
    arguments = (*vars(case).values(), 2, 16, 16, 10, 32)
    taken = time_calls([lambda: torch.ops.clover2.context_nodes(*arguments)])
    name = f"context_nodes {requests} requests, {length} tokens"
    return Timing(name, "clover2", taken, requests * length * 4 / taken / 1e3)


def time_all(quick: bool) -> tuple[float, list[Timing]]:
    """The copy bandwidth in GB/s and all timings."""
    copy = copy_bandwidth()
    results: list[Timing] = []
    for work in WORKLOADS[:4] if quick else WORKLOADS:
        results += time_attention(work, copy)
        torch.cuda.empty_cache()
    results += [time_commit(requests, 32, 4, copy) for requests in (1, 8, 64)]
    results += [time_accept(requests) for requests in (1, 64, 512)]
    results += [
        time_context(requests, length)
        for requests, length in ((1, 2000), (8, 2000), (64, 2000), (1, 131072))
    ]
    return copy, results
