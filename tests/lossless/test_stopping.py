# SPDX-License-Identifier: Apache-2.0
"""Requests stop where plain vLLM stops, also in the middle of an accepted path.

What is planted is the text that would follow if nothing stopped it.
"""

from dataclasses import replace

import pytest
from engine_fixtures import Baseline, PlantedRun, random_prompts
from engines import Engine, Output, Request
from planting import CommitSpy
from tiny_models import EOS

LENGTH = 60
Texts = list[tuple[Request, Output]]


@pytest.fixture
def texts(baseline: Baseline) -> Texts:
    """Prompts with the text that follows when nothing stops it."""
    requests = [r.replaced(max_tokens=LENGTH) for r in random_prompts(60, seed=20)]
    return list(zip(requests, baseline(requests), strict=True))


def test_max_tokens(
    engine: Engine, texts: Texts, run_planted: PlantedRun, commits: CommitSpy
) -> None:
    stopped = [
        request.replaced(max_tokens=1 + i % 12) for i, (request, _) in enumerate(texts)
    ]
    unstopped = [output for _, output in texts]
    run_planted(engine, stopped, truth=unstopped, seed=20, hit_rate=0.8)
    emitted_or_cut = len(texts) + sum(n * (1 + a) for a, n in commits.paths.items())
    assert emitted_or_cut > sum(r.params["max_tokens"] for r in stopped)  # some cut


def test_stop_tokens(engine: Engine, texts: Texts, run_planted: PlantedRun) -> None:
    stopped = [
        request.replaced(stop_token_ids=[output.tokens[5 + i % 30]])
        for i, (request, output) in enumerate(texts)
    ]
    unstopped = [output for _, output in texts]
    outputs = run_planted(engine, stopped, truth=unstopped, seed=21, hit_rate=0.8)
    assert all(output.finish_reason == "stop" for output in outputs)


def test_stop_strings(engine: Engine, texts: Texts, run_planted: PlantedRun) -> None:
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
    outputs = run_planted(engine, stopped, truth=unstopped, seed=22, hit_rate=0.8)
    assert sum(output.finish_reason == "stop" for output in outputs) > 10


def test_end_of_text(engine: Engine, texts: Texts, run_planted: PlantedRun) -> None:
    ending = [(r, o) for r, o in texts if EOS in o.tokens]
    assert len(ending) > 2, "no text of this target ends; change the prompts' seed"
    stopped = [request.replaced(ignore_eos=False) for request, _ in ending]
    unstopped = [output for _, output in ending]
    outputs = run_planted(engine, stopped, truth=unstopped, seed=23, hit_rate=0.8)
    assert all(output.finish_reason == "stop" for output in outputs)


@pytest.mark.parametrize("ignore_eos", [False, True], ids=["ends", "goes-on"])
def test_end_of_text_drafted_where_the_target_goes_on(
    ignore_eos: bool,
    engine: Engine,
    baseline: Baseline,
    texts: Texts,
    run_planted: PlantedRun,
) -> None:
    requests = [r.replaced(ignore_eos=ignore_eos) for r, _ in texts[:20]]
    ended = [
        replace(output, tokens=[*output.tokens[:9], EOS, 5])
        for output in baseline(requests)
    ]
    run_planted(engine, requests, truth=ended, seed=24, hit_rate=0.8)


@pytest.mark.parametrize("plant_the_stop", [False, True], ids=["text", "stop-token"])
def test_min_tokens_across_a_path(
    plant_the_stop: bool,
    engine: Engine,
    baseline: Baseline,
    texts: Texts,
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    """A stop token is masked up to ``min_tokens``, and not one token longer."""
    # Stop tokens that plain vLLM would pick right before and right after the limit.
    stopped = [
        request.replaced(stop_token_ids=[output.tokens[20 + i % 3]], min_tokens=21)
        for i, (request, output) in enumerate(texts[:24])
    ]
    expected = baseline(stopped)
    lengths = {len(output.tokens) for output in expected}
    assert min(lengths) >= 21
    assert lengths & {22, 23}, "no request stops right after min_tokens"
    truth = [output for _, output in texts[:24]] if plant_the_stop else expected
    run_planted(engine, stopped, truth=truth, seed=25, hit_rate=0.8)
    assert commits.accepted > len(stopped)
