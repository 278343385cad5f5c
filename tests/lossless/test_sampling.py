# SPDX-License-Identifier: Apache-2.0
"""Seeded samples, penalties and log-probabilities are those of plain vLLM.

A seeded request draws one number per emitted token, with or without drafts, so its
stream must be the very same, not only its distribution.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Baseline, random_prompts
from engines import Engine, EnginePool, Output, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from vllm.exceptions import VLLMValidationError

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
def engine(engines: EnginePool, target: Path, head: Path) -> Engine:
    return engines.get(target, head)


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeded_stream(
    variant: str,
    engine: Engine,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    requests = requests_with(VARIANTS[variant], 10, seed=30)
    expected = baseline(requests)
    plant(seed=30)
    actual = engine.run(with_truth(requests, expected))
    assert_same(expected, actual, requests)
    assert_same_logprobs(expected, actual)
    assert commits.moved > len(requests)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 64, "max_num_seqs": 8},
        {"block_size": 32, "num_gpu_blocks_override": 20},
    ],
    ids=["roomy", "chunked", "preempted"],
)
def test_everything_in_one_batch(
    options: dict[str, Any],
    engines: EnginePool,
    target: Path,
    head: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    """Also: a seeded request whose prompt is chunked, which kills stock vLLM."""
    requests = [
        request
        for i, variant in enumerate(MIXED)
        for request in requests_with(variant, 3, seed=40 + i)
    ]
    expected = baseline(requests)
    engine = engines.get(target, head, **options)
    plant(seed=40)
    actual = engine.run(with_truth(requests, expected))
    assert_same(expected, actual, requests)
    assert_same_logprobs(expected, actual)
    assert commits.moved > len(requests)


def test_chain_of_a_seeded_request(
    engines: EnginePool,
    target: Path,
    head: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    requests = [
        request
        for i, variant in enumerate(MIXED)
        for request in requests_with(variant, 2, seed=60 + i)
    ]
    expected = baseline(requests)
    chain = {"tree": "chain", "num_speculative_tokens": 5}
    engine = engines.get(target, head, chain)
    plant(seed=41, chain=True, hit_rate=0.9)
    actual = engine.run(with_truth(requests, expected))
    assert_same(expected, actual, requests)
    assert_same_logprobs(expected, actual)


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


@pytest.mark.parametrize(
    "refused", [{"min_p": 0.2}, {"logit_bias": {5: 1.0}}], ids=["min_p", "logit_bias"]
)
def test_a_refused_request_leaves_the_others_alone(
    refused: dict[str, Any],
    engine: Engine,
    baseline: Baseline,
    plant: Callable[..., Planter],
) -> None:
    """vLLM does not combine these two with any speculation."""
    requests = random_prompts(4, seed=62)
    expected = baseline(requests)
    plant(seed=43)
    ids = [engine.add(request) for request in with_truth(requests, expected)]
    outputs = engine.step()
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        engine.add(requests[0].replaced(temperature=0.9, **refused))
    while engine.busy:
        outputs |= engine.step()
    assert_same(expected, [outputs[i] for i in ids], requests)
