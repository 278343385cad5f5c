# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the host by a small emulator, against the references.

Covers index arithmetic, masks, splits and merge, barriers and double buffering on
machines without a GPU; test_cuda_ops.py runs the same kernels where there is one.
"""

import ctypes
import shutil
import subprocess
import sys
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from vllm_clover2.ops import reference

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "kernels" / "cuda"))

from random_cases import (  # noqa: E402
    AcceptCase,
    AttentionCase,
    CommitCase,
    accept_case,
    attention_case,
    commit_case,
)

MAX_LAYERS = 256
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# Rounding of probabilities and output to the type; values are about 1.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class TreeAttentionParams(ctypes.Structure):
    """TreeAttentionParams of launch.h."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "query", "cache", "out", "block_table", "prefix_lens", "query_starts",
            "row_offsets", "ancestors", "partial_out", "partial_stats")),
        *((name, c_int64) for name in (
            "query_token_stride", "query_head_stride", "out_token_stride",
            "out_head_stride", "cache_block_stride", "cache_head_stride",
            "cache_slot_stride", "block_table_stride")),
        *((name, c_int) for name in (
            "requests", "total_rows", "heads", "kv_heads", "head_dim", "block_size",
            "max_blocks", "sliding_window")),
        ("scale", c_float), ("softcap", c_float),
        *((name, c_int) for name in (
            "row_tiles", "max_splits", "min_tiles_per_split", "tile_keys")),
    ]  # fmt: skip


class TreeAcceptParams(ctypes.Structure):
    """TreeAcceptParams of launch.h."""

    _fields_ = [
        *((name, c_void_p) for name in (
            "target_tokens", "draft_tokens", "parents", "row_offsets", "paths",
            "lengths", "next_tokens")),
        ("requests", c_int), ("max_depth", c_int),
    ]  # fmt: skip


class CommitKvParams(ctypes.Structure):
    """CommitKvParams of launch.h."""

    _fields_ = [
        ("layers", c_void_p * MAX_LAYERS),
        *((name, c_void_p) for name in (
            "block_table", "prefix_lens", "paths", "lengths")),
        *((name, c_int64) for name in (
            "block_stride", "head_stride", "slot_stride", "block_table_stride",
            "row_bytes")),
        *((name, c_int) for name in (
            "num_layers", "requests", "max_depth", "kv_heads", "block_size")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the emulated kernels with")
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    command = [
        compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-fPIC", "-shared", "-DCLOVER2_EMULATED_GPU",
        f"-I{REPO / 'kernels'}", f"-I{REPO / 'tests/ops'}",
        str(REPO / "tests/ops/emulated_kernels.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for name, struct in (
        ("tree_attention", TreeAttentionParams),
        ("tree_accept", TreeAcceptParams),
        ("commit_kv", CommitKvParams),
    ):
        size = getattr(loaded, f"size_of_{name}")
        size.restype = c_int64
        assert size() == ctypes.sizeof(struct), f"{struct.__name__} differs"
    loaded.emulated_kernels_run.restype = c_int64
    return loaded


@pytest.fixture(params=["rising", "falling"])
def thread_order(request: pytest.FixtureRequest, gpu: ctypes.CDLL) -> str:
    gpu.emulate_falling_order(int(request.param == "falling"))
    return request.param


def run_attention(
    gpu: ctypes.CDLL,
    case: AttentionCase,
    multiprocessors: int = 132,
    softcap: float = 0.0,
    window: int = -1,
) -> tuple[torch.Tensor, TreeAttentionParams]:
    """The output [tokens, heads, D] and the parameters after planning."""
    out = case.out.clone()
    cache = case.kv_cache
    dim = case.query.shape[2]
    params = TreeAttentionParams(
        query=case.query.data_ptr(), cache=cache.data_ptr(), out=out.data_ptr(),
        block_table=case.block_table.data_ptr(),
        prefix_lens=case.prefix_lens.data_ptr(),
        query_starts=case.query_starts.data_ptr(),
        row_offsets=case.row_offsets.data_ptr(), ancestors=case.ancestors.data_ptr(),
        query_token_stride=case.query.stride(0), query_head_stride=case.query.stride(1),
        out_token_stride=out.stride(0), out_head_stride=out.stride(1),
        cache_block_stride=cache.stride(0), cache_head_stride=cache.stride(1),
        cache_slot_stride=cache.stride(2), block_table_stride=case.block_table.stride(0),
        requests=case.prefix_lens.numel(), total_rows=case.ancestors.numel(),
        heads=case.query.shape[1], kv_heads=cache.shape[1], head_dim=dim,
        block_size=cache.shape[2], max_blocks=case.block_table.shape[1],
        sliding_window=window, scale=dim**-0.5, softcap=softcap,
    )  # fmt: skip
    kind = TYPES[case.query.dtype]
    gpu.plan_tree_attention(ctypes.byref(params), kind, multiprocessors)
    parts = (params.max_splits, params.total_rows, params.heads)
    partial_out = torch.full((*parts, dim), torch.nan)
    partial_stats = torch.full((*parts, 2), torch.nan)
    params.partial_out = partial_out.data_ptr()
    params.partial_stats = partial_stats.data_ptr()
    assert gpu.launch_tree_attention(ctypes.byref(params), kind) == 0
    return out, params


def check_attention(
    gpu: ctypes.CDLL,
    case: AttentionCase,
    multiprocessors: int = 132,
    softcap: float = 0.0,
    window: int = -1,
) -> TreeAttentionParams:
    out, params = run_attention(gpu, case, multiprocessors, softcap, window)
    expected = case.out.clone()
    reference.tree_attention(
        case.query, case.kv_cache, 0, case.block_table, case.prefix_lens,
        case.query_starts, case.row_offsets, case.ancestors,
        case.query.shape[2] ** -0.5, softcap, window, expected,
    )  # fmt: skip
    tolerance = TOLERANCE[case.query.dtype]
    torch.testing.assert_close(
        out.float(), expected.float(), atol=tolerance, rtol=tolerance
    )
    return params


@pytest.mark.parametrize("dtype", list(TYPES), ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_attention_of_every_type_and_head_size(gpu, thread_order, dtype, dim):
    case = attention_case([37, 0, 130], [7, 3, 1], dim=dim, dtype=dtype, seed=dim)
    params = check_attention(gpu, case)
    assert params.max_splits > 1, "the merge was not tried"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads"), [(3, 3), (9, 3), (8, 1)], ids=["1", "3", "8"]
)
def test_attention_of_grouped_heads(gpu, dtype, heads, kv_heads):
    # 64 rows x 8 heads are four tiles of 128 queries; the last request fills none.
    case = attention_case([70, 5], [64, 2], heads, kv_heads, dtype=dtype)
    params = check_attention(gpu, case)
    assert params.row_tiles == -(-64 * (heads // kv_heads) // (
        64 if dtype == torch.float32 or heads == kv_heads else 128
    ))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 128])
def test_attention_of_block_sizes_and_strides(gpu, dtype, block_size):
    for slots_first in (False, True):
        case = attention_case(
            [100, 31], [5, 26], block_size=block_size, dtype=dtype,
            slots_first=slots_first, spare_columns=3,
        )  # fmt: skip
        check_attention(gpu, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 1, 31, 32, 33, 63, 64, 65, 127, 191, 192, 500])
def test_attention_at_tile_borders(gpu, dtype, prefix):
    for rows in (1, 2, 33, 64):
        case = attention_case([prefix], [rows], 2, 2, dtype=dtype, seed=rows)
        check_attention(gpu, case)


@pytest.mark.parametrize("multiprocessors", [1, 3, 132])
def test_attention_with_few_and_many_splits(gpu, multiprocessors):
    case = attention_case([1500, 3], [4, 9], 1, 1, dtype=torch.bfloat16)
    params = check_attention(gpu, case, multiprocessors)
    assert (params.max_splits == 1) == (multiprocessors == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 40, 400])
def test_attention_in_a_window(gpu, dtype, window):
    for chain in (False, True):
        case = attention_case([150, 20, 0], [12, 30, 5], dtype=dtype, chain=chain)
        check_attention(gpu, case, window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_soft_cap(gpu, dtype):
    case = attention_case([150, 20], [12, 30], dtype=dtype)
    check_attention(gpu, case, softcap=1.5)


def test_attention_leaves_empty_requests_and_padding_alone(gpu):
    case = attention_case([40, 9, 70, 6], [0, 5, 0, 3], dtype=torch.bfloat16)
    padded = torch.cat((case.ancestors, torch.ones(6, dtype=torch.int64)))
    case = AttentionCase(**{**vars(case), "ancestors": padded})
    check_attention(gpu, case)


def test_attention_without_requests_launches_nothing(gpu):
    before = gpu.emulated_kernels_run()
    case = attention_case([4], [0])
    run_attention(gpu, case)
    assert gpu.emulated_kernels_run() == before


def run_accept(
    gpu: ctypes.CDLL, case: AcceptCase, max_depth: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    requests = case.row_offsets.numel() - 1
    paths = torch.full((requests, max_depth), 99, dtype=torch.int32)
    lengths = torch.full((requests,), 99, dtype=torch.int32)
    next_tokens = torch.full((requests,), 99)
    params = TreeAcceptParams(
        *(tensor.data_ptr() for tensor in (*vars(case).values(), paths, lengths,
          next_tokens)), requests, max_depth,
    )  # fmt: skip
    assert gpu.launch_tree_accept(ctypes.byref(params)) == 0
    return paths, lengths, next_tokens


@pytest.mark.parametrize("vocabulary", [1, 2, 3])
@pytest.mark.parametrize("max_depth", [0, 1, 5, 70])
def test_accept_equals_the_reference(gpu, thread_order, vocabulary, max_depth):
    rows = [1, 2, 64, 33, 0, 26, 40]
    for seed in range(5):
        case = accept_case(rows, vocabulary, seed, chain=seed == 4)
        expected = reference.tree_accept(*vars(case).values(), max_depth)
        for found, wanted in zip(
            run_accept(gpu, case, max_depth), expected, strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def run_commit(gpu: ctypes.CDLL, case: CommitCase) -> None:
    cache = case.kv_caches[0]
    element = cache.element_size()
    params = CommitKvParams(
        (c_void_p * MAX_LAYERS)(*(layer.data_ptr() for layer in case.kv_caches)),
        case.block_table.data_ptr(), case.prefix_lens.data_ptr(),
        case.paths.data_ptr(), case.lengths.data_ptr(),
        *(stride * element for stride in cache.stride()[:3]),
        case.block_table.stride(0), cache.shape[3] * element, len(case.kv_caches),
        case.lengths.numel(), case.paths.shape[1], cache.shape[1], cache.shape[2],
    )  # fmt: skip
    assert gpu.launch_commit_kv(ctypes.byref(params)) == 0


@pytest.mark.parametrize("dtype", [*TYPES, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("slots_first", [False, True])
@pytest.mark.parametrize("dim", [64, 10], ids=["16 bytes", "1 byte"])
def test_commit_equals_the_reference(gpu, thread_order, dtype, slots_first, dim):
    # Lengths on both sides of a batch of 8; paths of 63 rows are in place already.
    case = commit_case(
        [3, 40, 0, 17, 9, 64], [0, 1, 5, 8, 9, 63], block_size=7, dim=dim,
        dtype=dtype, slots_first=slots_first,
    )  # fmt: skip
    expected = case.to("cpu")
    reference.commit_kv(
        [cache.view(torch.uint8) if element_is_byte(cache) else cache
         for cache in expected.kv_caches],
        0, *list(vars(expected).values())[1:],
    )  # fmt: skip
    run_commit(gpu, case)
    for found, wanted in zip(case.kv_caches, expected.kv_caches, strict=True):
        assert torch.equal(as_bytes(found), as_bytes(wanted))


def element_is_byte(tensor: torch.Tensor) -> bool:
    return tensor.element_size() == 1


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
