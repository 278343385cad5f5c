# SPDX-License-Identifier: Apache-2.0
"""Custom logits processors: text is that of plain vLLM with the same processors.

Those that vLLM's adapter calls for one request at a time are called for every token;
for one that sees the whole batch nothing is drafted, because it may count its calls,
unless its class says that it does not.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import (
    CHUNKED,
    PREEMPTED,
    Baseline,
    PlantedRun,
    random_prompts,
)
from engines import Engine, EnginePool, Output, Request
from planting import CommitSpy
from test_sampling import VARIANTS
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import (
    AdapterLogitsProcessor,
    BatchUpdate,
    LogitsProcessor,
    MoveDirectionality,
)
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class RareTokens(AdapterLogitsProcessor):
    """Lowers what the last tokens of text or prompt were; ``"window"`` says how many.

    With ``"counting"`` it also raises tokens by how often it was called.
    """

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        if (params.extra_args or {}).get("window", 1) < 1:
            raise VLLMValidationError("window must be positive")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        arguments = params.extra_args or {}
        window = arguments.get("window")
        if window is None:
            return None
        calls = 0

        def of_text(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            logits[output[-window:]] -= 4.0
            return logits

        def of_prompt(
            prompt: list[int], output: list[int], logits: torch.Tensor
        ) -> torch.Tensor:
            nonlocal calls
            calls += 1
            logits = logits.clone()
            logits[[*prompt, *output][-window:]] -= 4.0
            logits[calls % 7 :: 7] += 3.0
            return logits

        return of_prompt if arguments.get("counting") else of_text


class Sharpener(RareTokens):
    """Changes no argmax: only sampled requests see it."""

    def is_argmax_invariant(self) -> bool:
        return True

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        if "sharp" not in (params.extra_args or {}):
            return None
        return lambda output, logits: logits * (1.2 + 0.1 * (len(output) % 5))


class CallCounter(LogitsProcessor):
    """Raises tokens by how often it was called since the request came."""

    def __init__(self, config: Any, device: torch.device, pinned: bool) -> None:
        self.calls: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        for request in batch_update.removed:
            self.calls.pop(request, None)
        for request, *_ in batch_update.added:
            self.calls[request] = 0
        for source, target, direction in batch_update.moved:
            here, there = self.calls.pop(source, 0), self.calls.pop(target, 0)
            self.calls[target] = here
            if direction == MoveDirectionality.SWAP:
                self.calls[source] = there

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for request in self.calls:
            self.calls[request] += 1
            logits[request, self.calls[request] % 7 :: 7] += 3.0
        return logits


class TextFollower(LogitsProcessor):
    """Raises tokens by a sum over the text, which it keeps up to date by itself."""

    depends_on_text_alone = True
    argmax_invariant = False

    def __init__(self, config: Any, device: torch.device, pinned: bool) -> None:
        self.texts: dict[int, list[int]] = {}
        self.sums: dict[int, int] = {}

    def is_argmax_invariant(self) -> bool:
        return self.argmax_invariant

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(
            self.texts,
            batch_update,
            lambda params, _, output: (
                output if "window" in (params.extra_args or {}) else None
            ),
        )
        self.sums = {request: sum(text) for request, text in self.texts.items()}

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for request, total in self.sums.items():
            logits[request, total % 7 :: 7] += 3.0
        return logits


class SampledTextFollower(TextFollower):
    """The same where greedy requests do not see it."""

    argmax_invariant = True


ARGUMENTS: list[dict[str, Any]] = [
    {"window": 5},
    {"window": 40, "counting": True},
    {"sharp": True},
    {"window": 2, "sharp": True, "counting": True},
    {},
]
NAMES = ["greedy", "temperature", "repetition", "logit-bias", "greedy-logprobs"]


def mixed_requests(seed: int) -> list[Request]:
    """Every kind of request with all arguments, in lengths that differ."""
    prompts = iter(random_prompts(len(NAMES) * len(ARGUMENTS), seed=seed, longest=60))
    return [
        next(prompts).replaced(
            **VARIANTS[name], extra_args=arguments, seed=i, max_tokens=9 + (5 * i) % 31
        )
        for i, arguments in enumerate(ARGUMENTS)
        for name in NAMES
    ]


def assert_others(texts: list[Output], neutral: list[Output], count: int) -> None:
    """More than so many texts are not the neutral ones: the processors matter."""
    pairs = zip(texts, neutral, strict=True)
    assert sum(one.tokens != other.tokens for one, other in pairs) > count


@pytest.mark.parametrize(
    "processors",
    [[RareTokens, Sharpener], [TextFollower], [RareTokens, SampledTextFollower]],
    ids=["adapter", "whole-batch", "argmax-invariant"],
)
@pytest.mark.parametrize("concurrency", [25, 6], ids=["all-at-once", "come-and-go"])
def test_processors_that_follow_texts(
    concurrency: int,
    processors: list[type[LogitsProcessor]],
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    baseline: Baseline,
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = mixed_requests(seed=90)
    options = {"logits_processors": processors}
    expected = engines.get(target, **options).run(requests)
    assert_others(expected, baseline(requests), 10)
    engine = clover2(**options)
    run_planted(
        engine, requests, expected, concurrency=concurrency, seed=90, hit_rate=0.6
    )
    assert commits.moved > len(requests)
    counts = engine.runner.drafts.counts
    assert not any("not drafted" in reason for reason in counts)


@pytest.mark.parametrize("options", [CHUNKED, PREEMPTED], ids=["chunked", "preempted"])
def test_processors_under_pressure(
    options: dict[str, Any],
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    """Here plain vLLM, too, calls processors more often than there are tokens."""
    requests = [
        request
        for request in mixed_requests(seed=91)
        if not request.params["extra_args"].get("counting")
    ]
    processors = {"logits_processors": [RareTokens, Sharpener, TextFollower]}
    expected = engines.get(target, **processors).run(requests)
    engine = clover2(**processors, **options)
    run_planted(engine, requests, expected, seed=91, hit_rate=0.6)
    assert commits.moved > len(requests)
    with pytest.raises(VLLMValidationError, match="window must be positive"):
        engine.add(requests[0].replaced(extra_args={"window": 0}))


def test_nothing_is_drafted_for_a_processor_of_the_batch(
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    baseline: Baseline,
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = mixed_requests(seed=92)
    processors = {"logits_processors": [CallCounter]}
    expected = engines.get(target, **processors).run(requests)
    assert_others(expected, baseline(requests), 20)
    engine = clover2(**processors)
    run_planted(engine, requests, expected, concurrency=6, seed=92)
    assert commits.accepted == 0
    counts = engine.runner.drafts.counts
    assert counts["logits processor CallCounter: not drafted"] > len(requests)
