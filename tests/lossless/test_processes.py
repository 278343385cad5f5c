# SPDX-License-Identifier: Apache-2.0
"""Engines as users start them: own processes, tensor-parallel, compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Baseline, random_prompts
from engines import Output, Request
from planting import with_truth

HERE = Path(__file__).parent
REQUESTS = [
    *random_prompts(6, seed=110, longest=40),
    *random_prompts(3, seed=111),
]
REQUESTS = [r.replaced(max_tokens=24) for r in REQUESTS]
OWN = 3  # answered with the head's own drafts, too
REQUESTS[-1] = REQUESTS[-1].replaced(temperature=0.9, seed=4)


def run_elsewhere(folder: Path, requests: list[Request], **llm: Any) -> dict[str, Any]:
    """Answers of an engine in processes of its own, see ``engine_process``."""
    defaults = {
        "dtype": "float32",
        "max_model_len": 512,
        "max_num_seqs": 16,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 16 << 20,
        "enable_prefix_caching": False,
        "worker_extension_cls": "planting.PlantedWorker",
    }
    greedy = {"temperature": 0.0, "ignore_eos": True}
    task = {
        "llm": defaults | llm,
        "requests": [[r.prompt, greedy | r.params] for r in requests],
        "own": OWN,
        "seed": 110,
    }
    (folder / "task.json").write_text(json.dumps(task))
    subprocess.run(
        [
            *(sys.executable, str(HERE / "engine_process.py")),
            *(str(folder / "task.json"), str(folder / "answers.json")),
        ],
        env=os.environ
        | {
            # The checkout first: that of these tests, whatever is installed.
            "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE))),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
        },
        check=True,
        timeout=500,
    )
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="own-process"),
        pytest.param({"tensor_parallel_size": 2}, id="tensor-parallel"),
        pytest.param({"enforce_eager": False}, id="compiled"),
        pytest.param(
            {"tensor_parallel_size": 2, "head": "none"}, id="tensor-parallel-no-head"
        ),
        pytest.param({"enforce_eager": False, "head": "none"}, id="compiled-no-head"),
    ],
)
def test_text_of_other_processes(
    options: dict[str, Any],
    target: Path,
    head: Path,
    baseline: Baseline,
    tmp_path: Path,
) -> None:
    """Ranks must grow the same trees, else their caches and texts would part."""
    expected: list[Output] = baseline(REQUESTS)
    options = dict(options)
    speculative = {
        "method": "clover2",
        "model": options.pop("head", str(head)),
        "adaptive": False,
    }
    answers = run_elsewhere(
        tmp_path,
        with_truth(REQUESTS, expected),
        model=str(target),
        speculative_config=speculative,
        **options,
    )
    texts = [output.tokens for output in expected]
    assert answers["own"] == texts[:OWN]
    assert answers["planted"] == texts
    ranks = answers["commits"]
    assert len(ranks) == options.get("tensor_parallel_size", 1)
    assert all(rank == ranks[0] for rank in ranks)
    accepted, moved = ranks[0]
    assert accepted > len(REQUESTS)
    assert moved > len(REQUESTS)
