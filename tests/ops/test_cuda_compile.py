# SPDX-License-Identifier: Apache-2.0
"""The CUDA sources compile without a warning wherever nvcc is, GPU or not."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[2] / "kernels"
# A100 and B200; setup.py builds the same code for those between and after them too.
ARCHITECTURES = (80, 100)
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"


@pytest.fixture(scope="module")
def nvcc() -> str:
    for candidate in (shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate is not None and Path(candidate).exists():
            return candidate
    pytest.skip("no nvcc to compile the CUDA sources with")


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr


@pytest.mark.slow
def test_kernels_compile_for_every_architecture(nvcc: str, tmp_path: Path) -> None:
    sources = sorted(KERNELS.glob("cuda/*.cu"))
    assert sources
    targets = [
        f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES
    ]

    def compile_one(source: Path) -> None:
        run([
            nvcc, "-std=c++20", "-O3", "--Werror", "all-warnings",
            "-Xcompiler=-Wall,-Wextra", *targets, f"-I{KERNELS}",
            "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o"),
        ])  # fmt: skip

    # The small files finish beside the large one.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, reversed(sources)))


@pytest.mark.slow
def test_bindings_compile_against_the_stable_abi(nvcc: str, tmp_path: Path) -> None:
    run([
        nvcc, "-std=c++20", "-Xcompiler=-Wall,-Wextra,-Werror", TORCH_TARGET,
        f"-I{KERNELS}", "-isystem", str(Path(torch.__file__).parent / "include"),
        "-c", str(KERNELS / "cuda/bindings.cpp"), "-o", str(tmp_path / "bindings.o"),
    ])  # fmt: skip
