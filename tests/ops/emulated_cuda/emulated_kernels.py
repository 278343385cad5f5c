# SPDX-License-Identifier: Apache-2.0
"""Compiles and loads the emulated CUDA kernels, as ``torch.ops.clover2_emulated``."""

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import torch
from filelock import FileLock

from vllm_clover2.ops import schema

REPO = Path(__file__).parents[3]
NAMESPACE = "clover2_emulated"


@functools.cache
def load() -> ctypes.CDLL:
    """The loaded library, with its own functions beside the ops.

    Raises:
        FileNotFoundError: there is no g++ to compile it with.

    """
    definitions = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901
    for name, text in schema.SCHEMAS.items():
        definitions.define(name + text)
    path = build()
    torch.ops.load_library(path)
    library = ctypes.CDLL(str(path))
    library.emulated_kernels_run.restype = ctypes.c_int64
    library.definitions = definitions  # lives as long as the library
    library.emulate_falling_order(0)
    library.emulate_multiprocessors(132)
    library.emulate_shared_bytes(228 << 10)
    return library


def build() -> Path:
    """The compiled library; made anew when sources or torch have changed."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no g++ to compile the emulated kernels with")
    emulated = Path(__file__).parent
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in (REPO / "kernels", emulated):
        for source in sorted(folder.rglob("*.[ch]*")):
            digest.update(source.read_bytes())
    library = REPO / "build" / f"emulated-{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(exist_ok=True)
    with FileLock(
        library.with_name("emulated.lock")
    ):  # other test processes want it too
        if not library.exists():
            _compile(compiler, emulated, library)
    return library


def _compile(compiler: str, emulated: Path, library: Path) -> None:
    for old in library.parent.glob("emulated-*.so"):
        old.unlink()
    torch_folder = Path(torch.__file__).parent
    unfinished = library.with_suffix(".unfinished")
    command = [
        compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-fPIC", "-shared", "-DCLOVER2_EMULATED_GPU",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
        f"-I{REPO / 'kernels'}", f"-I{emulated}",
        f"-isystem{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}",
        str(emulated / "kernels.cpp"), "-o", str(unfinished), "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the emulated kernels do not compile:\n{done.stderr}")
    unfinished.rename(library)
