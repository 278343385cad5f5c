# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels against the references: on a GPU, and on an emulated one.

The emulator (``emulated_cuda/``) runs kernels and bindings on the host, so that index
arithmetic, masks, splits, barriers and double buffering are tested without a GPU.
"""

import ctypes
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_clover2 import ops as clover2_ops
from vllm_clover2.ops import reference

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "kernels" / "cuda"))
sys.path.insert(0, str(REPO / "tests" / "ops" / "emulated_cuda"))

import emulated_kernels  # noqa: E402
from random_cases import (  # noqa: E402
    AttentionCase,
    CommitCase,
    ContextCase,
    accept_case,
    attention_case,
    commit_case,
    context_case,
)

# Probabilities and output are rounded to the type; values are about 1, sums of float32
# come in another order.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TYPES = list(TOLERANCE)


class Gpu:
    """The ops of one device, and how to bring tensors to it."""

    def __init__(self, namespace: str, device: str, library: ctypes.CDLL | None):
        self.ops = getattr(torch.ops, namespace)
        self.device = device
        self.emulator = library

    def attend(
        self, case: AttentionCase, softcap: float = 0.0, window: int = -1
    ) -> torch.Tensor:
        """tree_attention's output, on the CPU."""
        case = case.to(self.device)
        out = case.out.clone()
        self.ops.tree_attention(*attention_arguments(case, out, softcap, window))
        return out.cpu()


def attention_arguments(
    case: AttentionCase, out: torch.Tensor, softcap: float = 0.0, window: int = -1
) -> tuple[Any, ...]:
    return (
        case.query, case.kv_cache, 0, case.block_table, case.prefix_lens,
        case.query_starts, case.row_offsets, case.ancestors,
        case.query.shape[2] ** -0.5, softcap, window, out,
    )  # fmt: skip


def commit_arguments(case: CommitCase) -> tuple[Any, ...]:
    return case.kv_caches, 0, *list(vars(case).values())[1:]


@pytest.fixture(scope="session")
def emulator() -> ctypes.CDLL:
    """The compiled emulator; its ops are registered as clover2_emulated."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    return emulated_kernels.load()


@pytest.fixture(
    params=[
        pytest.param("emulated", marks=pytest.mark.slow),
        pytest.param("cuda", marks=pytest.mark.requires_cuda),
    ]
)
def gpu(request: pytest.FixtureRequest) -> Gpu:
    if request.param == "emulated":
        emulator = request.getfixturevalue("emulator")
        emulator.emulate_falling_order(0)
        emulator.emulate_multiprocessors(132)
        emulator.emulate_shared_bytes(228 << 10)
        return Gpu(emulated_kernels.NAMESPACE, "cpu", emulator)
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if clover2_ops.backend("cuda") != "native":
        pytest.skip("the package was built without its CUDA kernels")
    return Gpu("clover2", "cuda", None)


@pytest.fixture(params=["rising", "falling"])
def thread_order(request: pytest.FixtureRequest, gpu: Gpu) -> None:
    """Both orders in which the emulator runs threads: one shows a missing barrier."""
    if gpu.emulator is not None:
        gpu.emulator.emulate_falling_order(int(request.param == "falling"))
    elif request.param == "falling":
        pytest.skip("threads of a real GPU run in no order")


def check_attention(
    gpu: Gpu, case: AttentionCase, softcap: float = 0.0, window: int = -1
) -> None:
    expected = case.out.clone()
    reference.tree_attention(*attention_arguments(case, expected, softcap, window))
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(
        gpu.attend(case, softcap, window).float(), expected.float(),
        atol=tolerance, rtol=tolerance,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [[7, 3, 1], [40, 33, 1]], ids=["small", "large"])
def test_attention_of_every_type_and_head_size(gpu, thread_order, dtype, dim, rows):
    case = attention_case([37, 0, 130], rows, dim=dim, dtype=dtype, seed=dim)
    check_attention(gpu, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (9, 3), (8, 1)], ids=["1", "3", "8"]
)
def test_attention_of_grouped_heads(gpu, dtype, heads, kv_heads):
    # 64 rows x 8 heads are four tiles of 128 queries; the last request fills none.
    check_attention(gpu, attention_case([70, 5], [64, 2], heads, kv_heads, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 128])
@pytest.mark.parametrize("slots_first", [False, True])
def test_attention_of_block_sizes_and_strides(gpu, dtype, block_size, slots_first):
    case = attention_case(
        [100, 31], [5, 26], block_size=block_size, dtype=dtype, spare_columns=3,
        slots_first=slots_first,
    )  # fmt: skip
    check_attention(gpu, case)


def test_attention_of_queries_inside_a_larger_tensor(gpu):
    case = attention_case([40], [9], dtype=torch.bfloat16)
    tokens, heads, dim = case.query.shape
    packed = torch.full((tokens, 3 * heads, dim), torch.nan, dtype=torch.bfloat16)
    packed[:, :heads] = case.query
    check_attention(gpu, replace(case, query=packed[:, :heads]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 31, 32, 33, 63, 64, 65, 127, 191, 192, 500])
@pytest.mark.parametrize("rows", [1, 2, 33, 64])
def test_attention_at_tile_borders(gpu, dtype, prefix, rows):
    check_attention(gpu, attention_case([prefix], [rows], 2, 2, dtype=dtype, seed=rows))


@pytest.mark.parametrize(
    ("multiprocessors", "kernels"), [(1, 1), (3, 2), (132, 2)], ids=str
)
def test_attention_with_few_and_many_splits(gpu, multiprocessors, kernels):
    case = attention_case([1500, 3], [64, 60], 2, 1, dtype=torch.bfloat16)
    if gpu.emulator is None:
        check_attention(gpu, case)
        return
    gpu.emulator.emulate_multiprocessors(multiprocessors)
    before = gpu.emulator.emulated_kernels_run()
    check_attention(gpu, case)
    # The second one merges splits.
    assert gpu.emulator.emulated_kernels_run() - before == kernels


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rows", [1, 26, 64])
@pytest.mark.parametrize(
    "gpu", [pytest.param("emulated", marks=pytest.mark.slow)], indirect=True
)
def test_attention_in_the_shared_memory_of_consumer_gpus(gpu, dtype, dim, rows):
    """100 KiB a multiprocessor on sm_86, sm_89 and sm_120."""
    gpu.emulator.emulate_shared_bytes(100 << 10)
    check_attention(gpu, attention_case([70], [rows], 8, 2, dim=dim, dtype=dtype))


@pytest.mark.requires_cuda
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_attention_over_long_prefixes(gpu, dtype):
    case = attention_case([4000, 0, 17, 9000], [26, 1, 64, 40], 32, 8, 128, dtype=dtype)
    check_attention(gpu, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 40, 400])
@pytest.mark.parametrize("chain", [False, True])
def test_attention_in_a_window(gpu, dtype, window, chain):
    case = attention_case([150, 20, 0], [12, 30, 5], dtype=dtype, chain=chain)
    check_attention(gpu, case, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_soft_cap(gpu, dtype):
    case = attention_case([150, 20], [12, 30], dtype=dtype)
    check_attention(gpu, case, softcap=1.5)


def test_attention_leaves_empty_requests_and_padding_alone(gpu):
    case = attention_case([40, 9, 70, 6], [0, 5, 0, 3], dtype=torch.bfloat16)
    padded = torch.cat((case.ancestors, torch.ones(6, dtype=torch.int64)))
    check_attention(gpu, replace(case, ancestors=padded))


def test_attention_of_an_empty_batch_changes_nothing(gpu):
    case = attention_case([4], [0])
    assert torch.equal(gpu.attend(case), case.out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_cache": torch.zeros(4, 2, 16, 96)}, "head size must be 64, 80"),
        ({"query": torch.zeros(6, 4, 65)[..., 1:]}, "query must begin at a multiple"),
        ({"prefix_lens": torch.zeros(2, dtype=torch.int32)}, "must have 1 elements"),
    ],
    ids=["head size", "alignment", "requests"],
)
def test_attention_refuses_with_a_reason(gpu, change, message):
    case = attention_case([30], [5])
    if "kv_cache" in change:
        change = {**change, "query": torch.zeros(6, 4, 48)}
        change["out"] = change["query"].clone()
    with pytest.raises(RuntimeError, match=message):
        gpu.attend(replace(case, **change))


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
@pytest.mark.parametrize("max_depth", [0, 1, 5, 70])
@pytest.mark.parametrize("chain", [False, True])
def test_accept_equals_the_reference(gpu, thread_order, vocabulary, max_depth, chain):
    rows = [1, 2, 64, 33, 0, 26, 40]
    for seed in range(5):
        case = accept_case(rows, vocabulary, seed, chain)
        expected = reference.tree_accept(*vars(case).values(), max_depth)
        found = gpu.ops.tree_accept(*vars(case.to(gpu.device)).values(), max_depth)
        for result, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(result.cpu(), wanted, rtol=0, atol=0)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [*TYPES, torch.uint8], ids=str)
@pytest.mark.parametrize("slots_first", [False, True])
@pytest.mark.parametrize("dim", [64, 5], ids=["16 bytes", "1 byte"])
def test_commit_equals_the_reference(gpu, thread_order, dtype, slots_first, dim):
    # Lengths on both sides of a batch of 8; paths of 63 rows are in place already.
    case = commit_case(
        [3, 40, 0, 17, 9, 64], [0, 1, 5, 8, 9, 63], block_size=7, dim=dim,
        dtype=dtype, slots_first=slots_first,
    )  # fmt: skip
    moved = case.to(gpu.device)
    gpu.ops.commit_kv(*commit_arguments(moved))
    reference.commit_kv(*commit_arguments(case))
    for found, wanted in zip(moved.kv_caches, case.kv_caches, strict=True):
        assert torch.equal(as_bytes(found), as_bytes(wanted))


def test_commit_of_layers_with_different_strides(gpu):
    case = commit_case([3, 40], [4, 6], layers=4)
    caches = [
        cache.transpose(1, 2).contiguous().transpose(1, 2) if layer == 1 else cache
        for layer, cache in enumerate(case.kv_caches)
    ]
    case = replace(case, kv_caches=caches)
    moved = case.to(gpu.device)
    gpu.ops.commit_kv(*commit_arguments(moved))
    reference.commit_kv(*commit_arguments(case))
    for found, wanted in zip(moved.kv_caches, case.kv_caches, strict=True):
        assert torch.equal(as_bytes(found), as_bytes(wanted))


def check_context(gpu: Gpu, case: ContextCase, *limits: int) -> None:
    expected = reference.context_nodes(*vars(case).values(), *limits)
    found = gpu.ops.context_nodes(*vars(case.to(gpu.device)).values(), *limits)
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result.cpu(), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 12])
@pytest.mark.parametrize("min_match", [1, 3])
@pytest.mark.parametrize("max_places", [1, 4, 33, 64])
@pytest.mark.parametrize("max_nodes", [1, 5, 128])
def test_context_equals_the_reference(
    gpu, thread_order, vocabulary, min_match, max_places, max_nodes
):
    case = context_case([0, 1, 2, 3, 31, 32, 33, 300, 700], vocabulary, vocabulary)
    check_context(gpu, case, min_match, 8, max_places, 9, max_nodes)
    check_context(gpu, case, min_match, 64, max_places, 63, max_nodes)


@pytest.mark.parametrize("vocabulary", [1, 2, 30, 5000])
@pytest.mark.parametrize("copied", [1, 100])
def test_context_of_several_tiles(gpu, thread_order, vocabulary, copied):
    """Tiles are 4,096 positions, which the last token is not one of."""
    case = context_case([4096, 4097, 4098, 13000], vocabulary, 1, copied)
    check_context(gpu, case, 1, 64, 64, 63, 128)
    check_context(gpu, case, 2, 5, 16, 10, 32)
    check_context(gpu, case, 4, 64, 3, 10, 32)


def test_context_at_tile_borders(gpu, thread_order):
    """Every place is found once, on both sides of a border."""
    distances = torch.tensor([1, 4095, 4096, 4097, 4098, 8191, 8192, 8193, 8194, 8999])
    history = torch.arange(9000, dtype=torch.int32)[None] + 100
    history[0, 8999 - distances] = history[0, -1] = 5
    one = torch.zeros(1, dtype=torch.int32)
    case = ContextCase(history, one, one + 9000)
    found = gpu.ops.context_nodes(*vars(case.to(gpu.device)).values(), 1, 9, 64, 9, 64)
    assert int(found[4][found[2] == 1].sum()) == len(distances)
    check_context(gpu, case, 1, 9, 64, 9, 64)


def test_context_outside_the_history_is_empty(gpu):
    """A kernel cannot raise; the request beside them is served."""
    case = context_case([50] * 5, 2).to(gpu.device)
    # Before and after these rows there are others, in which something would be found.
    case = replace(
        case,
        history=case.history[1:-1],
        requests=torch.tensor([0, -1, 4, 1, 2]).int().to(gpu.device),
        lengths=torch.tensor([50, 50, 50, -1, 56]).int().to(gpu.device),
    )
    found = gpu.ops.context_nodes(*vars(case).values(), 1, 8, 4, 5, 6)
    assert found[5].tolist() == [6, 0, 0, 0, 0]
    assert found[0].cpu()[1:].eq(-1).all()
    assert not any(column.cpu()[1:].any() for column in found[1:5])


def test_context_of_an_empty_batch(gpu):
    case = context_case([], 2).to(gpu.device)
    found = gpu.ops.context_nodes(*vars(case).values(), 1, 8, 4, 5, 6)
    assert [result.shape for result in found] == [(0, 6)] * 5 + [(0,)]


@pytest.mark.requires_cuda
@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_context_in_a_cuda_graph(gpu):
    case = context_case([700, 5000], 5000, copied=30).to("cuda")
    arguments = (*vars(case).values(), 2, 16, 16, 10, 32)
    expected = [result.clone() for result in gpu.ops.context_nodes(*arguments)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gpu.ops.context_nodes(*arguments)
    for result in found:
        result.fill_(-7)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.requires_cuda
@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_opcheck_on_the_gpu(gpu):
    attention = attention_case([40, 9], [7, 5], dtype=torch.bfloat16).to("cuda")
    accept = accept_case([7, 5], 2).to("cuda")
    commit = commit_case([3, 40], [4, 6]).to("cuda")
    torch.library.opcheck(
        gpu.ops.tree_attention.default, attention_arguments(attention, attention.out)
    )
    torch.library.opcheck(gpu.ops.tree_accept.default, (*vars(accept).values(), 5))
    torch.library.opcheck(gpu.ops.commit_kv.default, commit_arguments(commit))
    context = context_case([40, 9], 2).to("cuda")
    torch.library.opcheck(
        gpu.ops.context_nodes.default, (*vars(context).values(), 1, 8, 4, 5, 6)
    )


@pytest.mark.requires_cuda
@pytest.mark.parametrize("gpu", ["cuda"], indirect=True)
def test_attention_in_a_cuda_graph(gpu):
    case = attention_case([700, 90], [26, 9], 8, 2, 128, dtype=torch.bfloat16)
    expected = gpu.attend(case)
    case = case.to("cuda")
    arguments = attention_arguments(case, case.out)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gpu.ops.tree_attention(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.ops.tree_attention(*arguments)
    case.out.fill_(-7.0)
    graph.replay()
    assert torch.equal(case.out.cpu(), expected)
