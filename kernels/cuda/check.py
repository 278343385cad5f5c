# SPDX-License-Identifier: Apache-2.0
"""Everything that a machine with a GPU can show: ops, engines, times.

    python kernels/cuda/check.py --output report.json

Builds the CUDA ops and checks them against their references: for that it needs torch,
nvcc and a checkout. Where vLLM and this package are installed, a tiny engine on Model
Runner V2 is compared with vLLM alone. Then the ops are timed, and xformers' tree
attention beside ours where it is installed.

Ends with status 1 if anything is wrong. The report can go with an issue as it is.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict
from pathlib import Path

import torch
from random_cases import (
    AttentionCase,
    accept_case,
    attention_case,
    commit_case,
    context_case,
)
from timing import Timing, time_all
from tiny_engine import check_engines, why_not

KERNELS = Path(__file__).resolve().parents[1]
REPO = KERNELS.parent
TORCH_TARGET = "0x020b000000000000ULL"  # as in setup.py
SEED = 0
# Allowed |out - reference| / |reference|: sums in another order; probabilities and
# output rounded to the type.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def find_nvcc() -> str:
    """The CUDA compiler, or an error that says how to supply it."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")
    if found is None:
        raise SystemExit("nvcc must be on PATH or under CUDA_HOME; found neither")
    return found


def build_command(nvcc: str, architecture: str, library: Path) -> list[str]:
    """One nvcc call that compiles and links everything."""
    torch_folder = Path(torch.__file__).parent
    sources = sorted((KERNELS / "cuda").glob("*.c*"))
    return [
        nvcc, "-shared", "-std=c++20", "-O3", "--threads", "4", "-Xcompiler=-fPIC",
        f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA", f"-I{KERNELS}",
        "-isystem", str(torch_folder / "include"), f"-L{torch_folder / 'lib'}",
        "-o", str(library),
        *(str(path) for path in sources if path.suffix in (".cpp", ".cu")),
        # After what needs them, or linkers leave them out.
        "-ltorch_cpu", "-ltorch_cuda",
    ]  # fmt: skip


def build(folder: Path) -> Path:
    """Compiles the ops for the GPU that is there."""
    major, minor = torch.cuda.get_device_capability()
    library = folder / "clover2_cuda.so"
    command = build_command(find_nvcc(), f"{major}{minor}", library)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return library


def load_ops(library: Path) -> types.ModuleType:
    """Registers schemas, references and the built kernels; returns the references."""
    sys.path.insert(0, str(REPO))
    # An installed library must not come before the one built here.
    os.environ["CLOVER2_OPS"] = "reference"
    if importlib.util.find_spec("pydantic") is None:
        # vllm_clover2.tree's options need it; the references do not.
        tree = types.ModuleType("vllm_clover2.tree")
        tree.__path__ = [str(REPO / "vllm_clover2" / "tree")]
        sys.modules["vllm_clover2.tree"] = tree
    from vllm_clover2 import ops
    from vllm_clover2.ops import reference

    del os.environ["CLOVER2_OPS"]  # engines load what is installed
    torch.ops.load_library(library)
    if ops.backend("cuda") != "native":
        raise SystemExit("the built library registers no kernels for CUDA")
    return reference


def attention_cases() -> dict[str, tuple[AttentionCase, float, int]]:
    """Cases of tree_attention by name, with soft-cap and window."""
    cases: dict[str, tuple[AttentionCase, float, int]] = {}
    for dtype in MAX_ERROR:
        kind = str(dtype)[6:]
        for dim in (64, 80, 96, 128, 256):
            case = attention_case([333, 0, 64], [26, 5, 1], 8, 2, dim, dtype=dtype)
            cases[f"{kind} D={dim}"] = (case, 0.0, -1)
        for heads, kv_heads in ((1, 1), (9, 3), (32, 8), (16, 1)):
            case = attention_case([500, 7], [64, 26], heads, kv_heads, 64, dtype=dtype)
            cases[f"{kind} heads {heads}/{kv_heads}"] = (case, 0.0, -1)
        for prefix in (0, 1, 63, 64, 65, 1000, 4000, 20000):
            case = attention_case([prefix], [26], 32, 8, 128, dtype=dtype)
            cases[f"{kind} prefix {prefix}"] = (case, 0.0, -1)
        many = attention_case(
            [17 * i for i in range(64)], [1 + i for i in range(64)], 8, 2, 128,
            dtype=dtype, spare_columns=200,
        )  # fmt: skip
        cases[f"{kind} 64 requests"] = (many, 0.0, -1)
        for block_size in (7, 128):
            case = attention_case(
                [900, 100], [26, 9], 8, 2, 128, block_size, dtype, slots_first=True
            )
            cases[f"{kind} block size {block_size}"] = (case, 0.0, -1)
        case = attention_case([900, 3], [26, 64], 8, 2, 128, dtype=dtype)
        cases[f"{kind} soft-cap"] = (case, 2.0, -1)
        cases[f"{kind} window 5"] = (case, 0.0, 5)
        cases[f"{kind} window 100"] = (case, 0.0, 100)
    return cases


def attention_error(
    reference: types.ModuleType, case: AttentionCase, softcap: float, window: int
) -> float:
    """Relative error on the GPU; infinite if rows outside the trees changed."""
    case = case.to("cuda")
    expected = case.out.clone()
    arguments = (
        case.query, case.kv_cache, 0, case.block_table, case.prefix_lens,
        case.query_starts, case.row_offsets, case.ancestors,
        case.query.shape[2] ** -0.5, softcap, window,
    )  # fmt: skip
    reference.tree_attention(*arguments, expected)
    torch.ops.clover2.tree_attention(*arguments, case.out)
    torch.cuda.synchronize()
    outside = torch.ones(len(case.out), dtype=torch.bool, device="cuda")
    bounds = case.row_offsets.tolist()
    for start, begin, end in zip(
        case.query_starts.tolist(), bounds[:-1], bounds[1:], strict=True
    ):
        outside[start : start + end - begin] = False
    if not torch.equal(case.out[outside], expected[outside]):
        return math.inf
    found, wanted = case.out[~outside].double(), expected[~outside].double()
    return float((found - wanted).norm() / wanted.norm())


def check_attention(reference: types.ModuleType) -> list[dict[str, object]]:
    """Runs all cases; NaN is a failure too."""
    results = []
    for name, (case, softcap, window) in attention_cases().items():
        error = attention_error(reference, case, softcap, window)
        allowed = MAX_ERROR[case.query.dtype]
        results.append({
            "op": "tree_attention", "case": name, "error": error, "allowed": allowed,
            "ok": error <= allowed,
        })  # fmt: skip
    return results


def check_accept(reference: types.ModuleType) -> list[dict[str, object]]:
    """Exact on random trees with many accepted rows and duplicate siblings."""
    results = []
    for seed in range(SEED, SEED + 20):
        case = accept_case([1, 64, 0, 26, 33, 2], 1 + seed % 3, seed, seed % 4 == 0)
        expected = reference.tree_accept(*vars(case).values(), 1 + seed * 3)
        found = torch.ops.clover2.tree_accept(
            *vars(case.to("cuda")).values(), 1 + seed * 3
        )
        equal = all(
            torch.equal(one.cpu(), other)
            for one, other in zip(found, expected, strict=True)
        )
        results.append({"op": "tree_accept", "case": f"seed {seed}", "ok": equal})
    return results


def check_commit(reference: types.ModuleType) -> list[dict[str, object]]:
    """Exact on overlapping paths, for both orders of heads and slots."""
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        for slots_first in (False, True):
            for dim in (5, 128):
                case = commit_case(
                    [3, 40, 0, 17, 9, 64], [0, 1, 5, 8, 9, 63], 5, 2, dim, 7,
                    dtype=dtype, slots_first=slots_first,
                )  # fmt: skip
                moved = case.to("cuda")
                rest = list(vars(case).values())[1:]
                reference.commit_kv(case.kv_caches, 0, *rest)
                torch.ops.clover2.commit_kv(
                    moved.kv_caches, 0, *list(vars(moved).values())[1:]
                )
                equal = all(
                    torch.equal(one.cpu(), other)
                    for one, other in zip(moved.kv_caches, case.kv_caches, strict=True)
                )
                name = f"{str(dtype)[6:]} slots first {slots_first} D={dim}"
                results.append({"op": "commit_kv", "case": name, "ok": equal})
    return results


def check_context(reference: types.ModuleType) -> list[dict[str, object]]:
    """Exact on loops, on few long matches and on texts of many tiles."""
    results = []
    for lengths in ([0, 1, 2, 500, 4096, 4097, 4098], [30000], [700] * 40):
        for vocabulary, copied in ((1, 0), (2, 0), (30, 5), (50000, 100)):
            for limits in ((1, 64, 64, 63, 128), (2, 16, 16, 10, 32), (3, 4, 1, 1, 1)):
                case = context_case(lengths, vocabulary, SEED, copied)
                expected = reference.context_nodes(*vars(case).values(), *limits)
                found = torch.ops.clover2.context_nodes(
                    *vars(case.to("cuda")).values(), *limits
                )
                equal = all(
                    torch.equal(one.cpu(), other)
                    for one, other in zip(found, expected, strict=True)
                )
                name = f"lengths {lengths[:7]} of {vocabulary} tokens, limits {limits}"
                results.append({"op": "context_nodes", "case": name, "ok": equal})
    return results


def provenance() -> dict[str, object]:
    """What a reader needs to make the numbers again."""
    sha = subprocess.run(
        ["git", "-C", str(REPO), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    nvcc = subprocess.run(
        [find_nvcc(), "--version"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    return {
        "command": " ".join(["python", *sys.argv]),
        "git": sha or "unknown",
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "nvcc": next((line for line in nvcc if "release" in line), "unknown"),
        "python": platform.python_version(),
        "seed": SEED,
    }


def print_timings(copy: float, timings: list[Timing]) -> None:
    """One line per way of doing one thing."""
    print(f"\ncopy bandwidth {copy:.0f} GB/s (bytes read plus written)")
    print(f"{'what':58} {'how':9} {'us':>9} {'GB/s':>7} {'of copy':>8}")
    for one in timings:
        line = f"{one.what:58} {one.how:9}"
        if one.microseconds is not None:
            line += f" {one.microseconds:9.1f}"
        if one.gigabytes_per_second is not None and one.of_copy is not None:
            line += f" {one.gigabytes_per_second:7.0f} {one.of_copy:8.0%}"
        print(f"{line} {one.note}".rstrip())


def report_checks(checks: list[dict[str, object]], what: str) -> None:
    """What is wrong, and how much is right."""
    wrong = [check for check in checks if not check["ok"]]
    for check in wrong:
        print("WRONG", {name: part for name, part in check.items() if name != "logs"})
    print(f"{len(checks) - len(wrong)} of {len(checks)} {what} are right")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="write everything here as JSON")
    parser.add_argument("--no-timing", action="store_true", help="only check")
    parser.add_argument("--quick", action="store_true", help="time fewer sizes")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Builds, checks, times; the report is written anew after each part."""
    options = parse_options(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("needs an NVIDIA GPU that torch can use; found none")
    torch.manual_seed(SEED)
    report = provenance()

    def add(**parts: object) -> None:
        report.update(parts)
        if options.output is not None:
            options.output.write_text(json.dumps(report, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        reference = load_ops(build(Path(folder)))
    checks = [
        *check_attention(reference),
        *check_accept(reference),
        *check_commit(reference),
        *check_context(reference),
    ]
    report_checks(checks, "checks of ops")
    add(checks=checks)
    if (reason := why_not()) is not None:
        print(f"no engine was tried: {reason}")
        add(engines=reason)
    else:
        torch.cuda.empty_cache()  # engines ask for nine tenths of all memory
        with tempfile.TemporaryDirectory() as folder:
            engines = check_engines(Path(folder))
        report_checks(engines, "engines")
        add(engines=engines)
        checks += engines
    if not options.no_timing:
        copy, timings = time_all(options.quick)
        print_timings(copy, timings)
        add(
            copy_gigabytes_per_second=copy,
            timings=[asdict(timing) for timing in timings],
        )
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
