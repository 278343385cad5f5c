# SPDX-License-Identifier: Apache-2.0
"""Seeded samples, penalties and log-probabilities are those of plain vLLM.

A seeded request draws one number per emitted token, with or without drafts, so its
stream must be the very same, not only its distribution.
"""

from collections.abc import Callable
from typing import Any

import pytest
from engine_fixtures import (
    CHUNKED,
    PREEMPTED,
    Baseline,
    PlantedRun,
    random_prompts,
)
from engines import Engine, Output, Request, assert_same
from planting import CommitSpy, Planter
from vllm.sampling_params import BeamSearchParams

from vllm_clover2.integration import runner
from vllm_clover2.integration.request_sampling import RequestSampling

# Every second token, by up to half of the logits' own deviation.
BIAS = {token: 0.01 * (token % 300) for token in range(0, 512, 2)}
VARIANTS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.9},
    "hot": {"temperature": 2.0},
    "top-k": {"temperature": 0.8, "top_k": 20},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "top-k-top-p": {"temperature": 1.2, "top_k": 50, "top_p": 0.9},
    "frequency-presence": {
        "temperature": 0.8,
        "frequency_penalty": 0.6,
        "presence_penalty": 0.3,
    },
    "repetition": {"temperature": 0.8, "repetition_penalty": 1.3},
    "greedy-penalties": {"frequency_penalty": 0.9, "repetition_penalty": 1.5},
    "allowed-ids": {"temperature": 0.9, "allowed_token_ids": list(range(100, 400))},
    "greedy-allowed-ids": {"allowed_token_ids": list(range(50, 90))},
    "bad-words": {"temperature": 0.7, "bad_words": ["a", "the", "of", "License"]},
    "min-tokens": {"temperature": 0.9, "min_tokens": 9, "stop_token_ids": [5, 6, 7]},
    "min-p": {"temperature": 1.5, "min_p": 0.2},
    "min-p-top-k": {"temperature": 2.0, "min_p": 0.05, "top_k": 30},
    "logit-bias": {"temperature": 1.0, "logit_bias": BIAS, "min_p": 0.1},
    "greedy-logit-bias": {"logit_bias": BIAS, "min_tokens": 9, "stop_token_ids": [5]},
    "logprobs": {"temperature": 0.9, "logprobs": 3},
    "greedy-logprobs": {"logprobs": 5},
    "chosen-logprobs": {"temperature": 0.7, "logprob_token_ids": [4, 9, 300]},
    "many-logprobs": {"logprobs": 20},
    "prompt-logprobs": {"prompt_logprobs": 2, "logprobs": 0},
    "greedy": {},
}
# In a batch with chosen ids vLLM gives every other request these columns, too, instead
# of its own top ones: nothing to compare with, since batches differ.
MIXED = [variant for name, variant in VARIANTS.items() if name != "chosen-logprobs"]
# Tree attention adds in another order than vLLM's own; float32, log-probabilities of
# size 10.
LOGPROB_TOLERANCE = 2e-4


def requests_with(variant: dict[str, Any], count: int, seed: int) -> list[Request]:
    prompts = random_prompts(count, seed=seed)
    return [r.replaced(seed=100 + i, **variant) for i, r in enumerate(prompts)]


def requests_of_each(
    variants: list[dict[str, Any]], count: int, seed: int
) -> list[Request]:
    """``count`` requests with every variant, in the variants' order."""
    return [
        request
        for i, variant in enumerate(variants)
        for request in requests_with(variant, count, seed=seed + i)
    ]


def assert_same_logprobs(expected: list[Output], actual: list[Output]) -> None:
    for plain, ours in zip(expected, actual, strict=True):
        for kind in ("logprobs", "prompt_logprobs"):
            left, right = getattr(plain, kind), getattr(ours, kind)
            assert (left is None) == (right is None)
            for at_left, at_right in zip(left or [], right or [], strict=True):
                assert at_left == pytest.approx(at_right, abs=LOGPROB_TOLERANCE)
        if plain.logprobs is not None:
            assert ours.cumulative_logprob == pytest.approx(
                plain.cumulative_logprob, abs=LOGPROB_TOLERANCE * len(plain.tokens)
            )


@pytest.fixture
def check(run_planted: PlantedRun, baseline: Baseline) -> Callable[..., None]:
    """A planted run whose log-probabilities are compared, too."""

    def run_and_compare(
        engine: Engine, requests: list[Request], **options: Any
    ) -> None:
        actual = run_planted(engine, requests, **options)
        assert_same_logprobs(baseline(requests), actual)

    return run_and_compare


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeded_stream(
    variant: str, engine: Engine, check: Callable[..., None], commits: CommitSpy
) -> None:
    requests = requests_with(VARIANTS[variant], 10, seed=30)
    check(engine, requests, seed=30)
    assert commits.moved > len(requests)


@pytest.mark.parametrize(
    "options", [{}, CHUNKED, PREEMPTED], ids=["roomy", "chunked", "preempted"]
)
def test_everything_in_one_batch(
    options: dict[str, Any],
    clover2: Callable[..., Engine],
    check: Callable[..., None],
    commits: CommitSpy,
) -> None:
    """Also: a seeded request whose prompt is chunked, which kills stock vLLM."""
    requests = requests_of_each(MIXED, 3, seed=40)
    check(clover2(**options), requests, seed=40)
    assert commits.moved > len(requests)


def test_chain_of_a_seeded_request(
    clover2: Callable[..., Engine], check: Callable[..., None]
) -> None:
    requests = requests_of_each(MIXED, 2, seed=60)
    engine = clover2({"tree": "chain", "num_speculative_tokens": 5})
    accepted = engine.runner.drafts.counts["accepted, head"]
    check(engine, requests, seed=41, chain=True, hit_rate=0.9)
    assert engine.runner.drafts.counts["accepted, head"] > accepted + len(requests)


def test_several_answers_to_one_prompt(
    engine: Engine, plain: Engine, plant: Callable[..., Planter]
) -> None:
    """``n`` > 1 runs as ``n`` requests, whose seeds follow from the given one."""
    request = random_prompts(1, seed=61)[0].replaced(seed=5, temperature=1.0, n=3)
    prompt = {"prompt_token_ids": list(request.prompt)}
    answers = []
    plant(seed=42)
    for each in (plain, engine):
        output = each.llm.generate(prompt, request.sampling_params(), use_tqdm=False)
        answers.append([list(answer.token_ids) for answer in output[0].outputs])
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) == 3


def test_beam_search(engine: Engine, plain: Engine) -> None:
    """For vLLM it is many requests of one token each, with log-probabilities."""
    prompts = [
        {"prompt_token_ids": list(request.prompt)}
        for request in random_prompts(2, seed=66, longest=20)
    ]
    params = BeamSearchParams(beam_width=3, max_tokens=8, ignore_eos=True)
    expected, actual = (
        [
            [list(beam.tokens) for beam in answer.sequences]
            for answer in each.llm.beam_search(prompts, params)
        ]
        for each in (plain, engine)
    )
    assert len(expected[0]) == 3
    assert actual == expected


@pytest.mark.parametrize("name", ["min-p", "greedy-logit-bias"])
def test_min_p_and_logit_bias_matter(name: str, baseline: Baseline) -> None:
    """Else the tests above could not see them."""
    requests = requests_with(VARIANTS[name], 6, seed=30)
    neutral = {"min_p": 0.0, "logit_bias": None}
    without = baseline([request.replaced(**neutral) for request in requests])
    pairs = zip(baseline(requests), without, strict=True)
    assert sum(one.tokens != other.tokens for one, other in pairs) > 3


def test_requests_come_and_go(
    engine: Engine, check: Callable[..., None], commits: CommitSpy
) -> None:
    """What is kept by place in the batch has to move with its request."""
    requests = [
        request.replaced(max_tokens=3 + (7 * i) % 23)
        for i, request in enumerate(requests_of_each([*MIXED, *MIXED], 1, seed=70))
    ]
    check(engine, requests, concurrency=7, seed=44, hit_rate=0.6)
    assert commits.moved > len(requests)


def test_who_is_sampled_is_found_out_once_a_batch(
    engine: Engine, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While requests neither come nor go it does not change."""
    made: list[RequestSampling] = []

    def recording(batch: Any) -> RequestSampling:
        made.append(RequestSampling(batch))
        return made[-1]

    monkeypatch.setattr(runner, "RequestSampling", recording)
    requests = requests_with(VARIANTS["repetition"], 3, seed=65)
    assert_same(baseline(requests), engine.run(requests), requests)
    # All come in one step; of the 48 steps of each only the last ones see others go.
    assert 1 <= len(made) <= len(requests)


@pytest.mark.parametrize(
    "variant",
    ["temperature", "top-p", "greedy-penalties", "bad-words", "greedy-logprobs"],
)
def test_only_what_one_request_emits_is_sampled(
    variant: str,
    engine: Engine,
    baseline: Baseline,
    run_planted: PlantedRun,
    commits: CommitSpy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its parameters do not slow the others, and no text is copied."""
    requests = random_prompts(8, seed=63)
    requests[3:4] = requests_with(VARIANTS[variant], 1, seed=64)
    emitted = len(baseline(requests)[3].tokens)
    sampler, rows = engine.runner.sampler, []
    forward = sampler.forward

    def recording(logits: Any, sampling_metadata: Any, **options: Any) -> Any:
        rows.append(len(logits))
        texts = {id(r.output_token_ids) for r in engine.runner.requests.values()}
        assert {id(text) for text in sampling_metadata.output_token_ids} <= texts
        return forward(logits, sampling_metadata, **options)

    monkeypatch.setattr(sampler, "forward", recording)
    run_planted(engine, requests, seed=45, hit_rate=0.6)
    assert commits.accepted > len(requests)
    # What follows the last token may have been sampled, too.
    assert rows in ([1] * emitted, [1] * (emitted + 1))


def test_each_level_asks_for_what_its_requests_want(
    engine: Engine,
    baseline: Baseline,
    check: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A level without the penalized request computes no penalties."""
    names = ["temperature", "repetition", "top-p", "logprobs"]
    requests = requests_of_each([VARIANTS[name] for name in names], 1, seed=80)
    expected = baseline(requests)
    sampler, seen = engine.runner.sampler, []
    forward = sampler.forward

    def recording(logits: Any, sampling_metadata: Any, **options: Any) -> Any:
        penalties = not sampling_metadata.no_penalties
        top_p = sampling_metadata.top_p is not None
        logprobs = sampling_metadata.max_num_logprobs is not None
        seen.append((len(logits), penalties + top_p + logprobs))
        return forward(logits, sampling_metadata, **options)

    monkeypatch.setattr(sampler, "forward", recording)
    check(engine, requests, seed=46, hit_rate=0.6)
    # Three of the four want something each.
    assert all(wanted in (rows - 1, rows) for rows, wanted in seen)
    assert {rows for rows, _ in seen} == {1, 2, 3, 4}
    emitted = sum(len(output.tokens) for output in expected)
    assert emitted <= sum(rows for rows, _ in seen) <= emitted + len(requests)
