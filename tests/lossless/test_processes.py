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
from planting import TRUTH, with_truth
from tiny_models import TinyModel, save_random_head, save_target

HERE = Path(__file__).parent
REQUESTS = [
    *random_prompts(6, seed=110, longest=40),
    *random_prompts(3, seed=111),
]
REQUESTS = [r.replaced(max_tokens=24) for r in REQUESTS]
OWN = 3  # answered with the head's own drafts, too
REQUESTS[-1] = REQUESTS[-1].replaced(temperature=0.9, seed=4)


def run_elsewhere(
    folder: Path, requests: list[Request], own: int = OWN, **llm: Any
) -> dict[str, Any]:
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
        "own": own,
        "seed": 110,
        "truth": TRUTH,
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
        timeout=500,  # a rank that waits for another does so for ever
    )
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor-parallel"),
        pytest.param({"enforce_eager": False}, id="compiled"),
        pytest.param(
            {"tensor_parallel_size": 2, "enforce_eager": False, "head": "none"},
            id="tensor-parallel-compiled-no-head",
        ),
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
    ranks = answers["ranks"]
    assert len(ranks) == options.get("tensor_parallel_size", 1)
    assert all(rank == ranks[0] for rank in ranks)
    accepted, moved, emitted = ranks[0]
    assert starts(emitted, texts) == texts
    assert accepted > len(REQUESTS)
    assert moved > len(REQUESTS)


def starts(emitted: list[list[int]], texts: list[list[int]]) -> list[list[int]]:
    """What a rank emitted, up to where the texts end: a step may go beyond."""
    return [e[: len(text)] for e, text in zip(emitted, texts, strict=True)]


@pytest.mark.slow
def test_three_ranks_agree_in_bfloat16(tmp_path: Path) -> None:
    """Many tokens are equally likely, and adaptive ranks measure different times.

    Which of them is the text depends on how sums were rounded, but all ranks must say
    the same: else they would wait for each other, or read a cache of another text.
    """
    shape = TinyModel(576, 192, num_layers=2, num_heads=6, num_kv_heads=6, init=0.05)
    requests = random_prompts(10, seed=112, longest=40)
    requests = [r.replaced(max_tokens=150) for r in requests]
    requests[:5] = [r.replaced(logprobs=2) for r in requests[:5]]
    requests[-2:] = [r.replaced(temperature=0.9, seed=5) for r in requests[-2:]]
    answers = run_elsewhere(
        tmp_path,
        requests,
        own=len(requests),
        model=str(save_target(tmp_path / "target", shape)),
        dtype="bfloat16",
        tensor_parallel_size=3,
        speculative_config={
            "method": "clover2",
            "model": str(save_random_head(tmp_path / "head", shape)),
        },
    )
    assert answers["ties"] > 20
    ranks = answers["ranks"]
    assert len(ranks) == 3
    assert all(rank == ranks[0] for rank in ranks)
    accepted, moved, emitted = ranks[0]
    assert starts(emitted, answers["planted"]) == answers["planted"]
    assert min(accepted, moved) > len(requests)
    # What the scheduler sends back is what every rank has grown.
    for counts in answers["stats"]:
        assert "unknown draft" not in counts
        for count in ("verified, head", "accepted, head", "accepted, context"):
            assert counts[count] == answers["stats"][0][count] > 0
