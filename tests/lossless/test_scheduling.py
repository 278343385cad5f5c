# SPDX-License-Identifier: Apache-2.0
"""Text stays that of plain vLLM whatever the scheduler does to requests and drafts."""

from collections.abc import Callable
from typing import Any

import pytest
from engine_fixtures import PREEMPTED, Baseline, PlantedRun, random_prompts
from engines import Engine, Output, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor

from vllm_clover2.integration.drafting import FinishedStep
from vllm_clover2.tree.chooser import Chooser
from vllm_clover2.tree.step_cost import StepCost
from vllm_clover2.tree.types import GrownTrees


@pytest.mark.parametrize("block_size", [32, 128])
def test_paths_cross_block_boundaries(
    block_size: int,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = [r.replaced(max_tokens=150) for r in random_prompts(24, seed=3)]
    run_planted(clover2(block_size=block_size), requests, seed=block_size)
    assert commits.moved > 1000


def test_prefix_cache_hits_on_committed_blocks(
    clover2: Callable[..., Engine], run_planted: PlantedRun
) -> None:
    first = [r.replaced(max_tokens=140) for r in random_prompts(4, seed=4, longest=30)]
    engine = clover2(block_size=32)
    texts = run_planted(engine, first, seed=4)
    again = []
    for request, text in zip(first, texts, strict=True):
        for cut in (70, 100, 130):
            committed = (*request.prompt, *text.tokens[:cut])
            again += [Request(committed), Request((*committed, 77))]
    outputs = run_planted(engine, again, seed=5)
    for request, output in zip(again, outputs, strict=True):
        # vLLM computes the last block again, so that the draft gets hidden states.
        full_blocks = (len(request.prompt) - 1) // 32
        assert output.cached_tokens >= (full_blocks - 1) * 32 > 30


def test_prefix_cache_can_be_reset_between_requests(
    clover2: Callable[..., Engine], run_planted: PlantedRun
) -> None:
    requests = random_prompts(4, seed=6, longest=60)
    engine = clover2(block_size=32)
    for seed in (6, 7):
        engine.forget_prefixes()
        outputs = run_planted(engine, requests, seed=seed)
        assert all(output.cached_tokens == 0 for output in outputs)


@pytest.mark.parametrize(("budget", "nodes"), [(40, 25), (64, 25), (64, 63)])
def test_chunked_prefill_and_trees_in_one_batch(
    budget: int,
    nodes: int,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = random_prompts(24, seed=8, longest=200)
    tree = {"num_speculative_tokens": nodes}
    engine = clover2(tree, max_num_batched_tokens=budget, max_num_seqs=8)
    trimmed = engine.runner.drafts.counts["trimmed by the scheduler"]
    run_planted(engine, requests, seed=budget + nodes)
    assert engine.runner.drafts.counts["trimmed by the scheduler"] > trimmed
    assert commits.moved > 50


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Requests that had to give their blocks back during the test."""
    preempted: list[object] = []
    stock = Scheduler._preempt_request

    def preempt(
        scheduler: Scheduler, request: object, *args: object, **options: object
    ) -> None:
        preempted.append(request)
        stock(scheduler, request, *args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return preempted


@pytest.mark.parametrize("tree", [{}, {"tree": "chain"}], ids=["dynamic", "chain"])
def test_preempted_requests_resume(
    tree: dict[str, str],
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    preemptions: list[object],
) -> None:
    requests = [r.replaced(max_tokens=120) for r in random_prompts(12, seed=9)]
    engine = clover2(tree, **PREEMPTED)
    run_planted(engine, requests, seed=9, chain=tree.get("tree") == "chain")
    assert len(preemptions) > 5


def test_urgent_requests_take_the_place_of_others(
    clover2: Callable[..., Engine],
    baseline: Baseline,
    plant: Callable[..., Planter],
    preemptions: list[object],
) -> None:
    requests = [r.replaced(max_tokens=120) for r in random_prompts(12, seed=16)]
    expected = baseline(requests)
    engine = clover2(scheduling_policy="priority", **PREEMPTED)
    plant(seed=16, hit_rate=0.2)
    planted = with_truth(requests, expected)
    ids = [engine.add(request, priority=1) for request in planted[:9]]
    outputs: dict[str, Output] = {}
    for _ in range(10):
        outputs |= engine.step()
    urgent = [engine.add(request, priority=0) for request in planted[9:]]
    while engine.busy:
        outputs |= engine.step()
    assert_same(expected, [outputs[i] for i in ids + urgent], requests)
    assert preemptions
    last = list(outputs)[-len(urgent) :]
    assert not set(last) & set(urgent)


def keep_request_id(request: Any) -> None:
    request.external_req_id = request.request_id


def test_aborted_requests_and_reuse_of_their_ids(
    engine: Engine,
    baseline: Baseline,
    plant: Callable[..., Planter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Else vLLM adds a random suffix, and no id would ever come twice.
    monkeypatch.setattr(
        InputProcessor, "assign_request_id", staticmethod(keep_request_id)
    )
    requests = random_prompts(8, seed=10)
    expected = baseline(requests)
    planted = with_truth(requests, expected)
    plant(seed=10, hit_rate=0.1)  # requests must still run when they are aborted
    current = {f"r{i}": i for i in range(6)}
    for request_id, number in current.items():
        engine.add(planted[number], request_id)
    finished: dict[str, Output] = {}
    step = 0
    while engine.busy:
        step += 1
        finished |= engine.step()
        if step == 4:
            assert {"r1", "r4"} <= set(engine.runner.drafts._drafts)
            engine.abort("r1", "r4")
            engine.add(planted[6], "r1")  # the worker still knows the old one
            current["r1"] = 6
        if step == 6:
            engine.add(planted[7], "r9")
            current["r9"] = 7
    del current["r4"]
    assert {i for i in finished if finished[i].finish_reason != "abort"} == set(current)
    assert_same(
        [expected[number] for number in current.values()],
        [finished[request_id] for request_id in current],
        [requests[number] for number in current.values()],
    )
    # The worker hears of the last ones with the next step.
    engine.run(requests[:1])
    assert not set(engine.runner.drafts._drafts) & set(current)


def test_requests_up_to_the_length_limit(
    clover2: Callable[..., Engine], run_planted: PlantedRun
) -> None:
    lengths = (30, 470, 480, 500, 509, 510, 511)
    long = random_prompts(40, seed=11, longest=511)
    tokens = [token for request in long for token in request.prompt]
    requests = [
        Request(tuple(tokens[i : i + length]), {"max_tokens": 600})
        for i, length in enumerate(lengths)
    ]
    engine = clover2({"num_speculative_tokens": 63})
    trimmed = engine.runner.drafts.counts["trimmed by the scheduler"]
    outputs = run_planted(engine, requests, seed=11)
    assert {output.finish_reason for output in outputs} == {"length"}
    assert [len(r.prompt) + len(o.tokens) for r, o in zip(requests, outputs)] == (
        [512] * len(lengths)
    )
    assert engine.runner.drafts.counts["trimmed by the scheduler"] > trimmed


def test_prompts_of_one_token_get_placeholder_drafts(
    engine: Engine, baseline: Baseline, plant: Callable[..., Planter]
) -> None:
    requests = [Request((token,)) for token in (1, 2, 3, 4)]
    seen = engine.runner.drafts.counts["placeholder draft"]
    # One after the other: only beside running requests does vLLM pad a new one.
    expected = baseline(requests)
    plant(seed=12)
    planted = with_truth(requests, expected)
    ids = [engine.add(planted[0], "one-0")]
    outputs: dict[str, Output] = {}
    while engine.busy:
        outputs |= engine.step()
        if len(ids) < len(planted):
            ids.append(engine.add(planted[len(ids)], f"one-{len(ids)}"))
    assert_same(expected, [outputs[i] for i in ids], requests)
    assert engine.runner.drafts.counts["placeholder draft"] > seen


@pytest.mark.parametrize("depth", [1, 12, 40])
def test_depth_of_trees(
    depth: int,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    engine = clover2({"num_speculative_tokens": 63})
    requests = random_prompts(12, seed=13)
    run_planted(engine, requests, seed=depth, depth=depth, hit_rate=0.8)
    assert max(commits.paths) == depth or depth == 40 and max(commits.paths) > 25


def test_heads_own_drafts_of_depth_one(
    clover2: Callable[..., Engine], baseline: Baseline
) -> None:
    requests = random_prompts(12, seed=14)
    engine = clover2({"num_speculative_tokens": 3, "depth": 1, "top_k": 3})
    assert_same(baseline(requests), engine.run(requests), requests)


def test_requests_that_wait_for_budget_keep_their_drafts(
    clover2: Callable[..., Engine], run_planted: PlantedRun, commits: CommitSpy
) -> None:
    """With 16 requests and 40 rows a step most requests sit out most steps."""
    requests = random_prompts(16, seed=15, longest=20)
    engine = clover2(max_num_batched_tokens=40, max_num_seqs=16)
    run_planted(engine, requests, seed=15)
    assert engine.runner.drafts.counts["unknown draft"] == 0
    assert commits.accepted > len(requests)


@pytest.mark.parametrize("tree", [{}, {"tree": "chain"}], ids=["dynamic", "chain"])
def test_load_decides_what_is_drafted(
    tree: dict[str, str],
    clover2: Callable[..., Engine],
    baseline: Baseline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight rows cost as much as one, each further row as much as these together."""
    engine = clover2(tree)
    drafting = engine.runner.drafting
    cost = StepCost([1, 8, 64], [1.0, 1.0, 57.0], (0.0, 0.0), (0.0, 0.0), 512)
    monkeypatch.setattr(cost, "observe", lambda work, seconds: seconds)
    monkeypatch.setattr(drafting, "chooser", Chooser(cost))
    drafted: list[tuple[int, int]] = []  # of every step: requests, nodes
    draft = drafting.draft

    def recording(step: FinishedStep) -> GrownTrees:
        trees = draft(step)
        drafted.append((len(step.drafted), int(trees.sizes.sum())))
        return trees

    monkeypatch.setattr(drafting, "draft", recording)
    requests = [r.replaced(max_tokens=8) for r in random_prompts(12, seed=29)]
    requests[3:6] = [r.replaced(max_tokens=40) for r in requests[3:6]]
    assert_same(baseline(requests), engine.run(requests), requests)
    # Fewer once it is known that asking this random head brings nothing.
    assert max(nodes for running, nodes in drafted if running == 3) == 5
    assert {nodes for running, nodes in drafted if running == 12} == {0}
