# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled ops; everything else about the package is in pyproject.toml.

All C++ files of ``kernels/`` become ``vllm_clover2/ops/_C.abi3.so``, and with them the
CUDA files when torch has CUDA and a CUDA compiler is there. The library uses torch's
stable ABI and holds no Python module: one binary serves every Python and every torch
from TORCH_TARGET on. ``torch.ops.load_library`` loads it.

Environment: CLOVER2_BUILD_CUDA=0 leaves the CUDA files out, 1 insists on them;
TORCH_CUDA_ARCH_LIST chooses GPU architectures ("8.0;9.0;10.0;12.0+PTX" by default:
A100, H100, B200, RTX 50; 8.6 and 8.9 run the code of 8.0, and later ones compile what
is there as PTX).
"""

import os
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

KERNELS = Path("kernels")
# Oldest torch whose stable ABI is used: 2.11, which is vLLM's own choice.
TORCH_TARGET = "0x020b000000000000ULL"
PYTHON_TARGET = "0x030b0000"  # 3.11


def with_cuda() -> bool:
    """Whether the CUDA sources are compiled: torch knows CUDA and nvcc is installed."""
    found = cpp_extension.CUDA_HOME is not None
    wanted = os.environ.get("CLOVER2_BUILD_CUDA")
    if wanted == "1" and not found:
        raise RuntimeError(
            "CLOVER2_BUILD_CUDA=1 needs nvcc and a CUDA build of torch; found torch "
            f"{torch.__version__}. Install both, or leave the variable unset."
        )
    return found and wanted != "0"


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
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0;12.0+PTX")
        flags["nvcc"] = [*defines, "-DUSE_CUDA", "-std=c++20", "-O3"]
    build = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return build(
        "vllm_clover2.ops._C",
        [str(path) for path in sources],
        include_dirs=[str(KERNELS.resolve())],
        extra_compile_args=flags,
        py_limited_api=True,
    )


# One version has two wheels; a build tag in its file's name marks the one with CUDA.
tag = {"build_number": "1cuda"} if with_cuda() else {}
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp311", **tag}},
)
