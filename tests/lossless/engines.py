# SPDX-License-Identifier: Apache-2.0
"""Engines that run in the test's own process, and how tests drive them.

Several engines live side by side in one process; the first takes some seconds, each
further one less than a second, so every test may ask for the engine that it needs.
"""

import copy
import dataclasses
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

_request_numbers = itertools.count()


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it (arguments of ``SamplingParams``)."""

    prompt: tuple[int, ...]
    params: dict[str, Any] = field(default_factory=dict)
    lora: LoRARequest | None = None

    def sampling_params(self) -> SamplingParams:
        defaults = {"temperature": 0.0, "max_tokens": 48, "ignore_eos": True}
        # A copy: the engine writes into structured output parameters.
        return SamplingParams(**(defaults | copy.deepcopy(self.params)))

    def replaced(self, **params: Any) -> "Request":
        """The same prompt with some parameters changed."""
        return dataclasses.replace(self, params=self.params | params)


@dataclass(frozen=True)
class Output:
    """What a client sees of a finished request."""

    tokens: list[int]
    answers: list[list[int]]  # tokens of all ``n``; what follows is of the first
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]] | None  # by token id, one dict a token
    prompt_logprobs: list[dict[int, float]] | None
    cached_tokens: int

    @property
    def cumulative_logprob(self) -> float:
        assert self.logprobs is not None
        return sum(d[t] for d, t in zip(self.logprobs, self.tokens, strict=True))


class Engine:
    """An ``LLM`` with access to its insides and to its steps."""

    def __init__(self, target: Path, **options: Any) -> None:
        defaults = {
            "dtype": "float32",
            "max_model_len": 512,
            "max_num_seqs": 32,
            "enforce_eager": True,
            "kv_cache_memory_bytes": 32 << 20,
        }
        self.llm = LLM(str(target), **(defaults | options))

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def add(
        self, request: Request, request_id: str | None = None, priority: int = 0
    ) -> str:
        request_id = request_id or f"request-{next(_request_numbers)}"
        self.llm.llm_engine.add_request(
            request_id,
            {"prompt_token_ids": list(request.prompt)},
            request.sampling_params(),
            lora_request=request.lora,
            priority=priority,
        )
        return request_id

    def abort(self, *request_ids: str) -> None:
        self.llm.llm_engine.abort_request(list(request_ids))

    def step(self) -> dict[str, Output]:
        """One engine step; the requests that it finished, by id."""
        return {
            output.request_id: _output(output)
            for output in self.llm.llm_engine.step()
            if output.finished
        }

    @property
    def busy(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def run(
        self, requests: list[Request], concurrency: int | None = None
    ) -> list[Output]:
        """All requests, at most ``concurrency`` (default: all) of them at a time."""
        limit = concurrency or len(requests)
        waiting = list(enumerate(requests))[::-1]
        places: dict[str, int] = {}
        outputs: dict[int, Output] = {}
        while waiting or self.busy:
            while waiting and len(places) - len(outputs) < limit:
                place, request = waiting.pop()
                places[self.add(request)] = place
            for request_id, output in self.step().items():
                if request_id in places:  # else left over by a test that failed
                    outputs[places[request_id]] = output
        return [outputs[place] for place in range(len(requests))]

    def forget_prefixes(self) -> None:
        """Empty the prefix cache, so that the next run computes everything."""
        assert self.llm.reset_prefix_cache()


class EnginePool:
    """Engines by their options, started when first asked for."""

    def __init__(self) -> None:
        self._engines: dict[str, Engine] = {}

    def get(
        self, target: Path, head: Path | None = None, tree: Any = None, **options: Any
    ) -> Engine:
        """A plain engine, or one that speculates with ``head``.

        ``tree`` is a dict of tree options; the rest goes to ``LLM``.
        """
        if head is not None:
            speculative = {"method": "clover2", "model": str(head), **(tree or {})}
            options["speculative_config"] = speculative
        key = repr((target, sorted(options.items(), key=lambda item: item[0])))
        if key not in self._engines:
            # The engine changes the dict that it gets.
            if head is not None:
                options["speculative_config"] = dict(speculative)
            self._engines[key] = Engine(target, **options)
        return self._engines[key]


def assert_same(
    expected: list[Output], actual: list[Output], requests: list[Request]
) -> None:
    """Token ids, text, finish and stop reasons are those of plain vLLM.

    Reports the first token where each differing request left the plain text.
    """
    problems = []
    for number, (plain, ours) in enumerate(zip(expected, actual, strict=True)):
        same = ("tokens", "text", "finish_reason", "stop_reason")
        if all(getattr(plain, name) == getattr(ours, name) for name in same):
            continue
        at = first_difference(plain.tokens, ours.tokens)
        problems.append(
            f"request {number}, prompt of {len(requests[number].prompt)}, "
            f"{requests[number].params}: token {at} of {len(plain.tokens)}: "
            f"{plain.tokens[at : at + 4]} {plain.finish_reason} {plain.stop_reason}, "
            f"ours {ours.tokens[at : at + 4]} {ours.finish_reason} {ours.stop_reason}"
        )
    assert not problems, f"{len(problems)} of {len(expected)}:\n" + "\n".join(problems)


def first_difference(left: list[int], right: list[int]) -> int:
    """Index of the first unequal token (the shorter length if one is a prefix)."""
    pairs = zip(left, right, strict=False)
    unequal = (i for i, (a, b) in enumerate(pairs) if a != b)
    return next(unequal, min(len(left), len(right)))


def _output(output: Any) -> Output:
    completion = output.outputs[0]
    return Output(
        tokens=list(completion.token_ids),
        answers=[list(each.token_ids) for each in output.outputs],
        text=completion.text,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        logprobs=_plain_logprobs(completion.logprobs),
        prompt_logprobs=_plain_logprobs((output.prompt_logprobs or [])[1:]) or None,
        cached_tokens=output.num_cached_tokens or 0,
    )


def _plain_logprobs(positions: Any) -> list[dict[int, float]] | None:
    if positions is None:
        return None
    return [{i: entry.logprob for i, entry in at.items()} for at in positions]
