# SPDX-License-Identifier: Apache-2.0
"""``kernels/cuda/check.py`` on the fake GPU, in a process of its own.

    python gpu_check.py FOLDER_OF_VLLM WORK_FOLDER

Its report is ``results.json`` in the work folder. Few cases and short answers: what ops
and engines do is tested elsewhere; here it is that all of them are asked.
"""

import sys
from pathlib import Path

import emulated_kernels
import fake_gpu
import fake_vllm

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "cuda"))

import check  # noqa: E402
import tiny_engine  # noqa: E402

FEW = {"max_tokens": 8, "concurrency": 2, "samples": 0}


def main(vllm_folder: str, work: Path) -> int:
    from vllm_clover2.bench import lossless
    from vllm_clover2.bench.config import SHIPPED_PROMPTS
    from vllm_clover2.bench.engine import Engine

    program = Path(__file__).with_name("fake_engine.py")
    Engine.program = [str(program), vllm_folder]
    lossless._STREAMS = 2
    lines = SHIPPED_PROMPTS.read_text().splitlines(keepends=True)
    (work / "prompts.jsonl").write_text("".join(lines[:2]))
    tiny_engine.DTYPES = ("bfloat16",)  # others are run in float32
    tiny_engine.SETTINGS |= FEW | {"prompts": work / "prompts.jsonl"}
    fake_gpu.install()
    fake_vllm.register_emulated_kernels()
    check.build = lambda _: emulated_kernels.build()
    check.find_nvcc = lambda: "true"
    few = list(check.attention_cases().items())[:3]
    check.attention_cases = lambda: dict(few)
    return check.main(["--no-timing", "--output", str(work / "results.json")])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
