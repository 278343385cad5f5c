# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled ops; everything else about the package is in pyproject.toml.

All C++ files of ``kernels/`` become ``vllm_clover2/ops/_C.abi3.so``, and with them the
CUDA files when torch has CUDA and a CUDA compiler is there. The library uses torch's
stable ABI and holds no Python module: one binary serves every Python and every torch
from TORCH_TARGET on. ``torch.ops.load_library`` loads it.

Environment: CLOVER2_BUILD_CUDA=0 leaves the CUDA files out; TORCH_CUDA_ARCH_LIST
chooses GPU architectures ("8.0;9.0;10.0" by default).
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from torch.utils import cpp_extension

KERNELS = Path("kernels")
# Oldest torch whose stable ABI is used: 2.11, which is vLLM 0.32's own choice.
TORCH_TARGET = "0x020b000000000000ULL"
PYTHON_TARGET = "0x030b0000"  # 3.11


def with_cuda() -> bool:
    """Whether the CUDA sources are compiled: torch knows CUDA and nvcc is installed."""
    wanted = os.environ.get("CLOVER2_BUILD_CUDA", "1") != "0"
    return wanted and cpp_extension.CUDA_HOME is not None


def extension() -> Extension:
    """The one extension, CPU only or CPU and CUDA."""
    cuda = with_cuda()
    sources = sorted(
        path
        for pattern in ("*.cpp", "*.cu")
        for path in KERNELS.rglob(pattern)
        if cuda or "cuda" not in path.relative_to(KERNELS).parts[:-1]
    )
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
        f"-DPy_LIMITED_API={PYTHON_TARGET}",
    ]
    flags = {"cxx": [*defines, "-std=c++20", "-O3", "-Wall", "-Wextra"]}
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0")
        flags["nvcc"] = [*defines, "-DUSE_CUDA", "-std=c++20", "-O3"]
    build = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return build(
        "vllm_clover2.ops._C",
        [str(path) for path in sources],
        include_dirs=[str(KERNELS.resolve())],
        extra_compile_args=flags,
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
