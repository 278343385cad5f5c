# SPDX-License-Identifier: Apache-2.0
"""vLLM's counters of speculation and ours agree with what was emitted and accepted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_fixtures import Baseline, random_prompts
from engines import Engine, EnginePool, assert_same
from planting import TRUTH, CommitSpy, Planter

from vllm_clover2.tree.chooser import Chooser


def test_counters_add_up(
    clover2: Callable[..., Engine],
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    requests = random_prompts(20, seed=95)
    expected = baseline(requests)
    # Its counters are the ones that this process exports: the newest engine's.
    engine = clover2(disable_log_stats=False)
    plant(seed=95)
    planted = [
        # The last token is never planted, so no accepted path is cut at the end.
        request.replaced(extra_args={TRUTH: output.tokens[:-1]})
        for request, output in zip(requests, expected, strict=True)
    ]
    actual = engine.run(planted)
    assert_same(expected, actual, requests)

    ours = sums(engine)
    counters = spec_decode_metrics(engine)
    accepted = counters["vllm:spec_decode_num_accepted_tokens"]
    drafts = counters["vllm:spec_decode_num_drafts"]
    by_depth = counters["vllm:spec_decode_num_accepted_tokens_per_pos"]
    assert accepted == commits.accepted > 0
    assert drafts == commits.paths.total()
    # A prompt emits one token, a verified tree its path and one more.
    emitted = sum(len(output.tokens) for output in actual)
    assert emitted == len(requests) + drafts + accepted
    assert by_depth == [
        sum(count for length, count in commits.paths.items() if length > depth)
        for depth in range(16)  # context_depth: no tree is deeper
    ]
    nodes = counters["vllm:spec_decode_num_draft_tokens"]
    assert drafts <= nodes <= 25 * drafts

    assert ours["verified_nodes"] == nodes
    assert ours["accepted_nodes"] == ours["accepted_sibling_rank"] == accepted
    assert ours["accepted_depth"] == drafts
    assert ours["request_steps"] == len(requests) + drafts


def sums(engine: Engine) -> Counter[str]:
    """Our counters without their labels, and how often histograms were observed."""
    found: Counter[str] = Counter()
    for metric in engine.llm.get_metrics():
        if metric.name.startswith("vllm:clover2_"):
            count = getattr(metric, "count", None)
            value = metric.value if count is None else count
            found[metric.name.removeprefix("vllm:clover2_")] += value
    return found


def spec_decode_metrics(engine: Engine) -> dict[str, Any]:
    return {
        metric.name: getattr(metric, "values", None) or metric.value
        for metric in engine.llm.get_metrics()
        if "spec_decode" in metric.name
    }


def test_reasons_for_less_than_a_tree_are_counted(engine: Engine) -> None:
    (counts,) = engine.llm.collective_rpc("clover2_stats")
    assert counts == engine.runner.stats.counts
    assert engine.runner.drafts.counts is engine.runner.stats.counts
    assert engine.runner.drafting.backlog.given_up is engine.runner.stats.counts


def test_requests_that_are_not_drafted_for(
    engine: Engine,
    engines: EnginePool,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head could be asked but nothing pays; a text has nothing to offer."""
    requests = random_prompts(4, seed=96)
    monkeypatch.setattr(
        Chooser, "sizes", lambda _, ids, *__: np.zeros(len(ids), dtype=np.int64)
    )
    never_matches = {"context_min_match": 16}
    for outcome, asked in {
        "load": engine,
        "nothing found": engines.get(target, Path("none"), never_matches),
    }.items():
        before = asked.runner.stats.counts.copy()
        tokens = sum(len(output.tokens) for output in asked.run(requests))
        added = asked.runner.stats.counts - before
        of_requests = {key: n for key, n in added.items() if "requests, " in key}
        assert of_requests == {f"requests, {outcome}": tokens}
