# SPDX-License-Identifier: Apache-2.0
"""Requests stop where plain vLLM stops, also in the middle of an accepted path.

What is planted is the text that would follow if nothing stopped it.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_fixtures import Baseline, random_prompts
from engines import Engine, EnginePool, Output, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from tiny_models import EOS

LENGTH = 60


@pytest.fixture
def engine(engines: EnginePool, target: Path, head: Path) -> Engine:
    return engines.get(target, head)


@pytest.fixture
def texts(baseline: Baseline) -> list[tuple[Request, Output]]:
    """Prompts with the text that follows when nothing stops it."""
    requests = [r.replaced(max_tokens=LENGTH) for r in random_prompts(60, seed=20)]
    return list(zip(requests, baseline(requests), strict=True))


def check(
    engine: Engine,
    baseline: Baseline,
    stopped: list[Request],
    unstopped: list[Output],
) -> list[Output]:
    """Run ``stopped`` with the unstopped texts planted, against plain vLLM."""
    expected = baseline(stopped)
    actual = engine.run(with_truth(stopped, unstopped))
    assert_same(expected, actual, stopped)
    return actual


def test_max_tokens(
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    plant(seed=20, hit_rate=0.8)
    stopped = [
        request.replaced(max_tokens=1 + i % 12) for i, (request, _) in enumerate(texts)
    ]
    check(engine, baseline, stopped, [output for _, output in texts])
    emitted_or_cut = len(texts) + sum(n * (1 + a) for a, n in commits.paths.items())
    assert emitted_or_cut > sum(r.params["max_tokens"] for r in stopped)  # some cut


def test_stop_tokens(
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
) -> None:
    plant(seed=21, hit_rate=0.8)
    stopped = [
        request.replaced(stop_token_ids=[output.tokens[5 + i % 30]])
        for i, (request, output) in enumerate(texts)
    ]
    outputs = check(engine, baseline, stopped, [output for _, output in texts])
    assert all(output.finish_reason == "stop" for output in outputs)


def test_stop_strings(
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
) -> None:
    plant(seed=22, hit_rate=0.8)
    stopped, unstopped = [], []
    for request, output in texts:
        words = [
            output.text[i : i + 2]
            for i in range(10, len(output.text) - 2)
            if output.text[i : i + 2].isalpha() and output.text[i : i + 2].isascii()
        ]
        if words:
            stopped.append(request.replaced(stop=[words[0]], detokenize=True))
            unstopped.append(output)
    outputs = check(engine, baseline, stopped, unstopped)
    assert sum(output.finish_reason == "stop" for output in outputs) > 10


def test_end_of_text(
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
) -> None:
    plant(seed=23, hit_rate=0.8)
    ending = [(r, o) for r, o in texts if EOS in o.tokens]
    assert len(ending) > 2, "no text of this target ends; change the prompts' seed"
    stopped = [request.replaced(ignore_eos=False) for request, _ in ending]
    outputs = check(engine, baseline, stopped, [output for _, output in ending])
    assert all(output.finish_reason == "stop" for output in outputs)


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["ends", "goes-on"])
def test_end_of_text_drafted_where_the_target_goes_on(
    ignore_eos: bool,
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
) -> None:
    plant(seed=24, hit_rate=0.8)
    requests = [r.replaced(ignore_eos=ignore_eos) for r, _ in texts[:20]]
    expected = baseline(requests)
    planted = [
        request.replaced(extra_args={"planted_truth": [*output.tokens[:9], EOS, 5]})
        for request, output in zip(requests, expected, strict=True)
    ]
    assert_same(expected, engine.run(planted), requests)


@pytest.mark.parametrize("plant_the_stop", [False, True], ids=["text", "stop-token"])
def test_min_tokens_across_a_path(
    plant_the_stop: bool,
    engine: Engine,
    baseline: Baseline,
    texts: list[tuple[Request, Output]],
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    """A stop token is masked up to ``min_tokens``, and not one token longer."""
    plant(seed=25, hit_rate=0.8)
    # Stop tokens that plain vLLM would pick right before and right after the limit.
    stopped = [
        request.replaced(
            stop_token_ids=[output.tokens[20 + i % 3]],
            min_tokens=21,
        )
        for i, (request, output) in enumerate(texts[:24])
    ]
    expected = baseline(stopped)
    lengths = {len(output.tokens) for output in expected}
    assert min(lengths) >= 21
    assert lengths & {22, 23}, "no request stops right after min_tokens"
    truth = [output for _, output in texts[:24]] if plant_the_stop else expected
    actual = engine.run(with_truth(stopped, truth))
    assert_same(expected, actual, stopped)
    assert commits.accepted > len(stopped)
