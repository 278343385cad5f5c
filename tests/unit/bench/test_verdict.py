# SPDX-License-Identifier: Apache-2.0
"""What a difference from vLLM's own text means."""

import random

import pytest

from vllm_clover2.bench.engine import Answer
from vllm_clover2.bench.verdict import (
    ALPHA,
    Verdict,
    compare_greedy,
    compare_seeded,
    distributions_differ,
    tie_margin,
    worst,
)

# Plain vLLM's logits at each of three positions: 7 wins over 8 by a step of bfloat16.
TOP = [[(7, 12.0), (8, 12.0 - 2**-4), (9, 3.0)]] * 3


def answer(*tokens: int, top: list | None = None) -> Answer:
    return Answer("", list(tokens), 1.0, 0.5, 0.5, [], top)


PLAIN = answer(7, 7, 7, top=TOP)
CASES = {
    "same": ((7, 7, 7), (7, 7, 7), "float32", None),
    "near tie": ((7, 8, 1), (7, 7, 7), "bfloat16", Verdict.TIE),
    "no tie in float32": ((7, 8, 1), (7, 7, 7), "float32", Verdict.WRONG),
    "far off": ((7, 9, 1), (7, 7, 7), "bfloat16", Verdict.WRONG),
    "not near the top": ((7, 5, 1), (7, 7, 7), "bfloat16", Verdict.WRONG),
    "as vLLM with more in flight": ((7, 9, 1), (7, 9, 2), "float32", Verdict.TIE),
    "vLLM differs elsewhere": ((7, 9, 1), (7, 7, 9), "float32", Verdict.WRONG),
    "vLLM differs otherwise": ((7, 9, 1), (7, 8, 1), "float32", Verdict.WRONG),
    "goes on": ((7, 7, 7, 7), (7, 7, 7), "bfloat16", Verdict.WRONG),
    "stops": ((7, 7), (7, 7, 7), "bfloat16", Verdict.WRONG),
}


@pytest.mark.parametrize(
    ("ours", "other", "dtype", "verdict"), CASES.values(), ids=CASES
)
def test_greedy(
    ours: tuple[int, ...], other: tuple[int, ...], dtype: str, verdict: Verdict | None
):
    found = compare_greedy([PLAIN], [answer(*other)], [answer(*ours)], dtype)
    assert [one.verdict for one in found] == ([] if verdict is None else [verdict])


def test_a_divergence_says_where_and_by_how_much():
    plain = [answer(1), PLAIN]
    (found,) = compare_greedy(plain, plain, [answer(1), answer(7, 8, 7)], "bfloat16")
    assert (found.prompt, found.position, found.plain, found.ours) == (1, 1, 7, 8)
    assert found.top == [(7, 12.0), (8, 12.0 - 2**-4)]
    assert found.margin == 2**-4
    assert not found.plain_differs


def test_the_margin_of_a_tie_grows_with_the_logit():
    assert tie_margin(12.0, "bfloat16") == 8 * 2**-4
    assert tie_margin(-17.0, "bfloat16") == 8 * 2**-3
    assert tie_margin(0.01, "bfloat16") == 8 * 2**-7
    assert tie_margin(12.0, "float32") < 0.001


def test_the_worst_verdict_counts():
    assert worst([Verdict.EXACT]) == "exact"
    assert worst([Verdict.TIE, Verdict.EXACT]) == "numerical tie"
    assert worst([Verdict.TIE, Verdict.WRONG, Verdict.INCONCLUSIVE]) == "wrong"


def test_seeded_streams_may_differ_as_often_as_vllms_own():
    plain = [answer(n) for n in range(24)]
    few = [answer(99 if n < 3 else n) for n in range(24)]
    many = [answer(99 if n < 20 else n) for n in range(24)]
    assert compare_seeded(plain, plain, plain) == (24, Verdict.EXACT)
    assert compare_seeded(plain, few, few) == (21, Verdict.TIE)
    assert compare_seeded(plain, plain, many) == (4, Verdict.WRONG)
    assert compare_seeded(plain, many, many)[1] == Verdict.TIE


def test_any_position_may_give_a_bias_away():
    rng = random.Random(0)
    draw = lambda last: [[rng.randrange(8), rng.randrange(last)] for _ in range(400)]  # noqa: E731
    assert distributions_differ(draw(8), draw(8)) > ALPHA
    assert distributions_differ(draw(8), draw(6)) < ALPHA
    assert distributions_differ([[1, 2]] * 9, [[1, 2]] * 9) == 1.0
