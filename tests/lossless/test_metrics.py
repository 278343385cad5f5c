# SPDX-License-Identifier: Apache-2.0
"""vLLM's counters of speculation agree with what was emitted and accepted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine_fixtures import Baseline, random_prompts
from engines import Engine, EnginePool, assert_same
from planting import TRUTH, CommitSpy, Planter


def test_counters_add_up(
    engines: EnginePool,
    target: Path,
    head: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    requests = random_prompts(20, seed=95)
    expected = baseline(requests)
    # Its counters are the ones that this process exports: the newest engine's.
    engine = engines.get(target, head, disable_log_stats=False)
    plant(seed=95)
    planted = [
        # The last token is never planted, so no accepted path is cut at the end.
        request.replaced(extra_args={TRUTH: output.tokens[:-1]})
        for request, output in zip(requests, expected, strict=True)
    ]
    actual = engine.run(planted)
    assert_same(expected, actual, requests)

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
        for depth in range(25)
    ]
    nodes = counters["vllm:spec_decode_num_draft_tokens"]
    assert drafts <= nodes <= 25 * drafts


def spec_decode_metrics(engine: Engine) -> dict[str, Any]:
    return {
        metric.name: getattr(metric, "values", None) or metric.value
        for metric in engine.llm.get_metrics()
        if "spec_decode" in metric.name
    }


def test_reasons_for_less_than_a_tree_are_counted(
    engines: EnginePool, target: Path, head: Path
) -> None:
    engine = engines.get(target, head)
    (counts,) = engine.llm.collective_rpc("clover2_stats")
    given_up = engine.runner.drafting.backlog.given_up
    assert counts == {**engine.runner.drafts.counts, **given_up}
