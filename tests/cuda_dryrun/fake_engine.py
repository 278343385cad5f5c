# SPDX-License-Identifier: Apache-2.0
"""The program of ``bench.engine`` on the fake GPU, with CUDA graphs.

    python fake_engine.py FOLDER_OF_VLLM ARGUMENTS

``gpu_check.py`` has it started in place of the real one.
"""

import json
import sys
from pathlib import Path

import fake_vllm
from scenarios import emulated_attention

SIZES = [1, 2, 26, 52]  # rows of one and two requests, without and with trees


def main(vllm_folder: str, arguments: str) -> None:
    fake_vllm.install(Path(vllm_folder))
    from vllm_clover2.bench import engine

    graphs = fake_vllm.GRAPHS | fake_vllm.graphs_of("FULL_AND_PIECEWISE", *SIZES)
    # The emulated kernel would take minutes; other tests run it.
    with emulated_attention(False):
        engine._serve(fake_vllm.ENGINE | graphs | json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
