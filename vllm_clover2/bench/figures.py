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
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class MeasuredRound:
    """All prompts, answered once by one method with so many requests in flight."""

    method: str
    concurrency: int
    number: int  # from 1
    seconds: float
    requests: list[MeasuredRequest]  # in the order of the prompts
    steps: Steps  # of all requests


class _Part(NamedTuple):
    """Figures of some requests of one round; None where they are not known."""

    decode_speed: float
    request_speed: float
    first_token_seconds: float
    steps: Steps | None
    tokens_per_step: float | None
    step_seconds: float | None


def _part(
    requests: list[MeasuredRequest], concurrency: int, steps: Steps | None
) -> _Part:
    decoded = [one for one in requests if one.num_tokens > 1]
    later_tokens = sum(one.num_tokens - 1 for one in decoded)
    decode_seconds = sum(one.decode_seconds for one in decoded)
    if concurrency == 1:
        decode_speed = later_tokens / decode_seconds
    else:
        decode_speed = statistics.median(
            (one.num_tokens - 1) / one.decode_seconds for one in decoded
        )
    if steps is None and all(one.steps is not None for one in requests):
        steps = Steps.total([one.steps for one in requests if one.steps is not None])
    return _Part(
        decode_speed=decode_speed,
        request_speed=sum(one.num_tokens for one in requests)
        / sum(one.first_token_seconds + one.decode_seconds for one in requests),
        first_token_seconds=statistics.median(
            one.first_token_seconds for one in requests
        ),
        steps=steps,
        tokens_per_step=later_tokens / steps.num_steps if steps else None,
        step_seconds=decode_seconds / steps.num_steps if steps else None,
    )


def summarise(
    tasks: Sequence[str],  # of the prompts
    rounds: Sequence[MeasuredRound],
) -> list[dict[str, Any]]:
    """Figures by concurrency, method and task; "none" is what the others go by.

    Rounds may be missing at the end: ratios are over the rounds that both have.
    """
    result = []
    for concurrency in sorted({one.concurrency for one in rounds}):
        by_method: dict[str, list[MeasuredRound]] = {}
        for one in rounds:
            if one.concurrency == concurrency:
                by_method.setdefault(one.method, []).append(one)
        plain = by_method["none"]
        methods = {name: _method(tasks, own, plain) for name, own in by_method.items()}
        result.append({"concurrency": concurrency, "methods": methods})
    return result


def _method(
    tasks: Sequence[str], own: list[MeasuredRound], plain: list[MeasuredRound]
) -> dict[str, Any]:
    speeds, plain_speeds = (
        [sum(one.num_tokens for one in r.requests) / r.seconds for r in side]
        for side in (own, plain)
    )
    indices = list(range(len(tasks)))
    by_task = {
        task: _figures([i for i in indices if tasks[i] == task], own, plain, False)
        for task in dict.fromkeys(tasks)
    }
    busy = [
        sum(one.first_token_seconds + one.decode_seconds for one in r.requests)
        / r.seconds
        for r in own
    ]
    return {
        "tokens_per_second": statistics.median(speeds),
        "tokens_per_second_by_round": speeds,
        "speedup": _ratios(speeds, plain_speeds),
        "requests_in_flight": statistics.mean(busy),
        **_figures(indices, own, plain, True),
        "mean_over_tasks": {
            name: statistics.mean(
                figures[name]["median"] for figures in by_task.values()
            )
            for name in ("decode_speedup", "request_speedup")
        },
        "by_task": by_task,
    }


def _figures(
    indices: list[int],  # of prompts
    own: list[MeasuredRound],
    plain: list[MeasuredRound],
    whole: bool,  # these are all prompts
) -> dict[str, Any]:
    def parts(rounds: list[MeasuredRound]) -> list[_Part]:
        return [
            _part(
                [r.requests[i] for i in indices],
                r.concurrency,
                r.steps if whole else None,
            )
            for r in rounds
        ]

    mine, theirs = parts(own), parts(plain)

    def median(value: Callable[[_Part], float | None]) -> float | None:
        known = [found for part in mine if (found := value(part)) is not None]
        return statistics.median(known) if known else None

    def speedup(value: Callable[[_Part], float | None]) -> dict[str, float] | None:
        sides = [[value(part) for part in side] for side in (mine, theirs)]
        return None if None in sides[0] + sides[1] else _ratios(*sides)

    known = [part.steps for part in mine if part.steps is not None]
    steps = Steps.total(known)
    return {
        "decode_tokens_per_second": median(lambda part: part.decode_speed),
        "decode_speedup": speedup(lambda part: part.decode_speed),
        "request_tokens_per_second": median(lambda part: part.request_speed),
        "request_speedup": speedup(lambda part: part.request_speed),
        "first_token_seconds": median(lambda part: part.first_token_seconds),
        "tokens_per_step": median(lambda part: part.tokens_per_step),
        "step_seconds": median(lambda part: part.step_seconds),
        "step_cost": speedup(lambda part: part.step_seconds),
        "acceptance_by_depth": [reached / steps.num_steps for reached in steps.reached],
        "identical": sum(_identical(i, own, plain) for i in indices),
        "prompts": len(indices),
    }


def _ratios(own: Sequence[Any], plain: Sequence[Any]) -> dict[str, float]:
    """Median and spread of the rounds' ratios."""
    ratios = [mine / theirs for mine, theirs in zip(own, plain)]
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
