# SPDX-License-Identifier: Apache-2.0
"""Greedy text in float32 is token for token that of plain vLLM."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_fixtures import Baseline, PlantedRun, random_prompts, repeated_prompts
from engines import Engine, EnginePool, assert_same
from planting import CommitSpy

from vllm_clover2 import ops

DYNAMIC = {"num_speculative_tokens": 25, "adaptive": False}
METHODS = {
    "dynamic": DYNAMIC,
    "adaptive": {},
    "static": {"tree": "static"},
    "paths": {"tree": [[0], [1], [0, 0], [1, 0], [0, 0, 0]]},
    "chain": {"tree": "chain", "num_speculative_tokens": 5},
}


@pytest.mark.parametrize("concurrency", [1, 8, 32])
@pytest.mark.parametrize("method", METHODS)
def test_the_heads_own_drafts(
    method: str,
    concurrency: int,
    clover2: Callable[..., Engine],
    baseline: Baseline,
) -> None:
    requests = random_prompts(120, seed=1)
    if concurrency < 32:  # nearly nothing of a random head is accepted: slow
        requests = requests[: 10 + 3 * concurrency]
    actual = clover2(METHODS[method]).run(requests, concurrency)
    assert_same(baseline(requests), actual, requests)


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("method", ["dynamic", "adaptive", "chain"])
def test_text_that_repeats_itself(
    method: str, concurrency: int, engines: EnginePool, repeating: Path, head: Path
) -> None:
    """Both sources' nodes are in the trees, and the text's are accepted."""
    requests = repeated_prompts(8 + concurrency, seed=16)
    expected = engines.get(repeating).run(requests)
    engine = engines.get(repeating, head, METHODS[method])
    before = engine.runner.drafts.counts.copy()
    assert_same(expected, engine.run(requests, concurrency), requests)
    seen = engine.runner.drafts.counts - before
    if method == "dynamic":
        assert seen["verified, head"] > 0
    if method != "adaptive":
        assert seen["accepted, context"] + seen["accepted, both"] > len(requests)


@pytest.mark.parametrize("concurrency", [1, 8, 32])
@pytest.mark.parametrize("nodes", [1, 25, 63])
def test_planted_trees(
    nodes: int,
    concurrency: int,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = random_prompts(120, seed=2)
    if concurrency < 32:
        requests = requests[: 20 + 3 * concurrency]
    engine = clover2({"num_speculative_tokens": nodes})
    run_planted(engine, requests, concurrency=concurrency, seed=nodes + concurrency)
    assert commits.accepted > len(requests)
    assert (commits.moved > len(requests)) == (nodes > 1)


@pytest.mark.skipif(
    os.environ.get("CLOVER2_OPS") == "reference", reason="asked for the references"
)
def test_engines_run_the_compiled_ops() -> None:
    assert ops.backend("cpu") == "native"
