# SPDX-License-Identifier: Apache-2.0
"""From what requests took to figures of methods, and their ratios to no speculation.

Definitions, used in all tables:

tokens/s         tokens of all answers by the time from the first request to the last
                 token, prefills included.
decode speed     one request at a time: tokens after the first by the time they took,
                 summed over requests. Several at a time: the median over requests of
                 (tokens - 1) / (last token - first token), the inverse of the time per
                 output token; prefills of other requests are in it, as users see them.
request speed    tokens by the time from a request's arrival to its last token, summed
                 over requests; what a task's speed-up is taken from, because tasks
                 share the steps of an engine.
tokens/step      tokens after the first by the steps that gave them, with or without a
                 draft. Without speculation it is 1.
step time        the same time by the same steps.
step cost        step time by that without speculation. tokens/step divided by step cost
                 is what decoding gains, summed over requests: tokens/step is the bound
                 that drafting and verifying for free would reach.

Ratios are taken round by round (methods take turns, so that rounds of one number are
neighbours in time); their median stands in tables, with the smallest and the largest.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

__all__ = [
    "MeasuredRequest",
    "MeasuredRound",
    "Steps",
    "accepted_by_step",
    "first_difference",
    "summarise",
]


def accepted_by_step(
    accepted: Sequence[int],  # nodes that each verify step accepted, in order
    num_tokens: int,  # of the answer
) -> list[int]:
    """Nodes that every step after the first token accepted.

    The engine does not cut the last step's path where the answer ends; a step that
    nothing was drafted for is one that accepted nothing.
    """
    left = num_tokens - 1  # the first token comes from the prefill
    lengths = []
    for length in accepted:
        lengths.append(min(length, left))
        left = max(0, left - length - 1)
    return lengths + [0] * left


class Steps(NamedTuple):
    """Steps after the first token, of one or several requests."""

    num_steps: int
    reached: list[int]  # [k]: how many of them accepted at least k + 1 nodes

    @classmethod
    def of(cls, accepted: Sequence[int]) -> "Steps":
        """From the number of nodes that each step accepted."""
        depth = max(accepted, default=0)
        reached = [sum(length > k for length in accepted) for k in range(depth)]
        return cls(len(accepted), reached)

    @classmethod
    def total(cls, parts: Sequence["Steps"]) -> "Steps":
        """All of them together."""
        columns = zip_longest(*(part.reached for part in parts), fillvalue=0)
        return cls(sum(part.num_steps for part in parts), [sum(c) for c in columns])


@dataclass(frozen=True)
class MeasuredRequest:
    """One answer in one round."""

    content: Sequence[Any]  # token ids, or text where only that is known
    num_tokens: int
    first_token_seconds: float
    decode_seconds: float  # from the first token to the last
    steps: Steps | None  # None: only known for the round


class Measured(NamedTuple):
    """All prompts, answered once."""

    seconds: float
    requests: list[MeasuredRequest]  # in the order of the prompts
    steps: Steps  # of all requests
    longest_step_seconds: float | None = None  # None: only an engine knows


@dataclass(frozen=True)
class MeasuredRound:
    """All prompts, answered once by one method with so many requests in flight."""

    method: str
    concurrency: int
    number: int  # from 1
    seconds: float
    requests: list[MeasuredRequest]  # in the order of the prompts
    steps: Steps  # of all requests
    longest_step_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers by the time the round took."""
        return sum(one.num_tokens for one in self.requests) / self.seconds

    @property
    def requests_in_flight(self) -> float:
        """Mean over the round, which ends with fewer than it starts with."""
        busy = (one.first_token_seconds + one.decode_seconds for one in self.requests)
        return sum(busy) / self.seconds


class _Part(NamedTuple):
    """Figures of some requests of one round; None where there is nothing to divide."""

    decode_speed: float | None
    request_speed: float
    first_token_seconds: float
    steps: Steps
    tokens_per_step: float | None
    step_seconds: float | None


def _part(
    requests: list[MeasuredRequest],
    concurrency: int,
    steps: Steps | None,  # None: those of the requests, where they are known
) -> _Part:
    if steps is None:
        known = [one.steps for one in requests if one.steps is not None]
        steps = Steps.total(known)
    later_tokens = sum(one.num_tokens - 1 for one in requests)
    decode_seconds = sum(one.decode_seconds for one in requests)
    # A client may receive a short answer in one piece, which has no speed.
    decoded = [one for one in requests if one.decode_seconds > 0]
    speeds = [(one.num_tokens - 1) / one.decode_seconds for one in decoded]
    if concurrency == 1 and decoded:
        speeds = [later_tokens / decode_seconds]
    seconds = [one.first_token_seconds + one.decode_seconds for one in requests]
    return _Part(
        decode_speed=statistics.median(speeds) if speeds else None,
        request_speed=sum(one.num_tokens for one in requests) / sum(seconds),
        first_token_seconds=statistics.median(
            one.first_token_seconds for one in requests
        ),
        steps=steps,
        tokens_per_step=later_tokens / steps.num_steps if steps.num_steps else None,
        step_seconds=decode_seconds / steps.num_steps if steps.num_steps else None,
    )


def summarise(
    tasks: Sequence[str],  # of the prompts
    rounds: Sequence[MeasuredRound],
    swing: bool = False,  # loads went from one to what is called the concurrency
) -> list[dict[str, Any]]:
    """Figures by concurrency, method and task; "none" is what the others go by.

    At each concurrency the first prompts are answered, as many in each round. Rounds
    may be missing at the end: ratios are over the rounds that both have.
    """
    result = []
    for concurrency in sorted({one.concurrency for one in rounds}):
        by_method: dict[str, list[MeasuredRound]] = {}
        for one in rounds:
            if one.concurrency == concurrency:
                by_method.setdefault(one.method, []).append(one)
        plain = by_method["none"]
        answered = tasks[: len(plain[0].requests)]
        methods = {
            name: _method(answered, own, plain) for name, own in by_method.items()
        }
        load = {"concurrency": concurrency, "swing": swing}
        result.append(load | {"methods": methods})
    return result


def _method(
    tasks: Sequence[str], own: list[MeasuredRound], plain: list[MeasuredRound]
) -> dict[str, Any]:
    everything = range(len(tasks))
    by_task = {
        task: _figures([i for i in everything if tasks[i] == task], own, plain)
        for task in dict.fromkeys(tasks)
    }
    speeds = [one.tokens_per_second for one in own]
    longest = [step for one in own if (step := one.longest_step_seconds) is not None]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_by_round": speeds,
        "speedup": _ratios(speeds, [one.tokens_per_second for one in plain]),
        "longest_step_seconds": statistics.median(longest) if longest else None,
        "requests_in_flight": statistics.mean(one.requests_in_flight for one in own),
        **_figures(everything, own, plain),
        "mean_over_tasks": {
            name: statistics.mean(ratios)
            for name in ("decode_speedup", "request_speedup")
            if (
                ratios := [
                    task[name]["median"] for task in by_task.values() if task[name]
                ]
            )
        },
        "by_task": by_task,
    }


def _figures(
    indices: Sequence[int],  # of prompts
    own: list[MeasuredRound],
    plain: list[MeasuredRound],
) -> dict[str, Any]:
    def parts(rounds: list[MeasuredRound]) -> list[_Part]:
        return [
            _part(
                [one.requests[i] for i in indices],
                one.concurrency,
                one.steps if len(indices) == len(one.requests) else None,
            )
            for one in rounds
        ]

    mine, theirs = parts(own), parts(plain)

    def median(name: str) -> float | None:
        known = [value for part in mine if (value := getattr(part, name)) is not None]
        return statistics.median(known) if known else None

    def ratios(name: str) -> dict[str, float] | None:
        return _ratios(*([getattr(p, name) for p in side] for side in (mine, theirs)))

    steps = Steps.total([part.steps for part in mine])
    return {
        "decode_tokens_per_second": median("decode_speed"),
        "decode_speedup": ratios("decode_speed"),
        "request_tokens_per_second": median("request_speed"),
        "request_speedup": ratios("request_speed"),
        "first_token_seconds": median("first_token_seconds"),
        "tokens_per_step": median("tokens_per_step"),
        "step_seconds": median("step_seconds"),
        "step_cost": ratios("step_seconds"),
        "acceptance_by_depth": [count / steps.num_steps for count in steps.reached],
        "identical": sum(_identical(i, own, plain) for i in indices),
        "prompts": len(indices),
    }


def _ratios(
    own: Sequence[float | None], plain: Sequence[float | None]
) -> dict[str, float] | None:
    """Median and spread of the rounds' ratios; None if there is none."""
    pairs = zip(own, plain)  # an interrupted method has fewer rounds
    ratios = [mine / theirs for mine, theirs in pairs if mine and theirs]
    if not ratios:
        return None
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
    }


def _identical(
    index: int, own: list[MeasuredRound], plain: list[MeasuredRound]
) -> bool:
    """Whether an answer is, in every round, that of no speculation in this round.

    Without speculation: that of the first round, so that one sees whether the target
    repeats itself at all.
    """
    if own is plain:
        plain = [plain[0]] * len(own)
    return all(
        mine.requests[index].content == theirs.requests[index].content
        for mine, theirs in zip(own, plain)
    )


def first_difference(own: Sequence[Any], plain: Sequence[Any]) -> int | None:
    """Position of the first token that differs, or at which one answer has ended."""
    for position, (mine, theirs) in enumerate(zip_longest(own, plain)):
        if mine != theirs:
            return position
    return None
