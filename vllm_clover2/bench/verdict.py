# SPDX-License-Identifier: Apache-2.0
"""Whether answers are vLLM's own, and what a difference means.

Sums in another order round differently, so vLLM alone answers differently when only the
number of requests in a step changes. Such a difference starts where two tokens are
nearly as likely: a numerical tie. Anything else is wrong.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from vllm_clover2.bench.engine import Answer
from vllm_clover2.bench.figures import first_difference
from vllm_clover2.bench.statistics import more_often, same_distribution

__all__ = [
    "ALPHA",
    "Divergence",
    "Verdict",
    "compare_greedy",
    "compare_seeded",
    "distributions_differ",
    "identical_answers",
    "tie_margin",
    "worst",
]

ALPHA = 1e-4
"""Chance of calling a lossless engine wrong, for each statistical test."""

# Spacing of numbers from 1 to 2.
_SPACING = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
# How many such steps rounding moves a logit at most. tests/lossless/test_bfloat16.py
# has met up to five; errors of float32 add up over layers before one is rounded off.
_STEPS = {"bfloat16": 8, "float16": 8, "float32": 1024}


class Verdict(StrEnum):
    """From best to worst."""

    EXACT = "exact"
    TIE = "numerical tie"
    INCONCLUSIVE = "inconclusive"
    WRONG = "wrong"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The one that counts for all."""
    return max(verdicts, key=list(Verdict).index)


@dataclass(frozen=True)
class Divergence:
    """The first token of an answer that is not plain vLLM's."""

    prompt: int
    position: int  # in the answer
    plain: int | None  # plain vLLM's token; None: its answer had ended
    ours: int | None
    top: list[tuple[int, float]]  # plain vLLM's two likeliest tokens, and their logits
    margin: float | None  # of its token's logit to ours; None: ours is not near the top
    tie_margin: float  # up to which rounding explains it
    plain_differs: bool  # plain vLLM says what we do when its batch size changes

    @property
    def verdict(self) -> Verdict:
        near = self.margin is not None and self.margin <= self.tie_margin
        return Verdict.TIE if near or self.plain_differs else Verdict.WRONG


def tie_margin(logit: float, dtype: str) -> float:
    """Difference of two logits near `logit` that rounding in `dtype` can make."""
    exponent = math.floor(math.log2(max(abs(logit), 1.0)))
    return _STEPS[dtype] * _SPACING[dtype] * 2.0**exponent


def compare_greedy(
    plain: Sequence[Answer],  # one at a time, with their top logits
    others: Sequence[Answer],  # plain vLLM with several in flight
    ours: Sequence[Answer],
    dtype: str,  # that the target computes in
) -> list[Divergence]:
    """Where our answers leave plain vLLM's; empty if they never do."""
    found = []
    for prompt, (answer, other, own) in enumerate(
        zip(plain, others, ours, strict=True)
    ):
        position = first_difference(own.token_ids, answer.token_ids)
        if position is not None:
            found.append(_divergence(prompt, position, answer, other, own, dtype))
    return found


def _divergence(
    prompt: int, position: int, plain: Answer, other: Answer, own: Answer, dtype: str
) -> Divergence:
    theirs, mine = _token(plain, position), _token(own, position)
    # Where plain vLLM's answer has ended there are no logits, and no tie.
    top = plain.top[position] if plain.top and theirs is not None else []
    logits = dict(top)
    chosen, own_logit = (logits.get(-1 if t is None else t) for t in (theirs, mine))
    return Divergence(
        prompt=prompt,
        position=position,
        plain=theirs,
        ours=mine,
        top=sorted(top, key=lambda entry: -entry[1])[:2],
        margin=None if chosen is None or own_logit is None else chosen - own_logit,
        tie_margin=0.0 if chosen is None else tie_margin(chosen, dtype),
        plain_differs=first_difference(other.token_ids, plain.token_ids) == position
        and _token(other, position) == mine,
    )


def _token(answer: Answer, position: int) -> int | None:
    tokens = answer.token_ids
    return tokens[position] if position < len(tokens) else None


def identical_answers(left: Sequence[Answer], right: Sequence[Answer]) -> int:
    """How many answers have the same tokens."""
    return sum(a.token_ids == b.token_ids for a, b in zip(left, right, strict=True))


def compare_seeded(
    plain: Sequence[Answer], others: Sequence[Answer], ours: Sequence[Answer]
) -> tuple[int, Verdict]:
    """How many of our seeded streams are plain vLLM's, and what that means.

    A draw decides between tokens whose weighted probabilities may be as close as in a
    tie, but which those were nobody reports. So streams may differ as often as vLLM's
    own do when only its batch size changes (`others`), and not more often.
    """
    size, identical = len(plain), identical_answers(plain, ours)
    if identical == size:
        return identical, Verdict.EXACT
    different = size - identical_answers(plain, others)
    wrong = more_often(size - identical, size, different, size) < ALPHA
    return identical, Verdict.WRONG if wrong else Verdict.TIE


def distributions_differ(
    left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]
) -> float:
    """Probability that samples of one distribution differ so much at any position.

    Each position is tested by itself, and the smallest probability is multiplied by
    their number (Bonferroni).
    """
    found = [
        same_distribution(*sides)
        for sides in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True)
    ]
    known = [p for p in found if p is not None]
    return min(1.0, min(known) * len(known)) if known else 1.0
