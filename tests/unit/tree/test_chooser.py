# SPDX-License-Identifier: Apache-2.0
"""Choices on synthetic cost curves, against brute force over all of them."""

import itertools

import numpy as np
import pytest

from vllm_clover2.tree.chooser import Chooser, best_nodes
from vllm_clover2.tree.step_cost import StepCost, Work

RNG = np.random.default_rng


def cost_of(slope: float, knee: int = 1, draft: float = 1e-3) -> StepCost:
    """20 ms up to ``knee`` rows, then ``slope`` seconds for each further one."""
    rows = sorted({1, knee, 64, 256, 4096})
    seconds = [20e-3 + slope * max(0, n - knee) for n in rows]
    return StepCost(rows, seconds, (draft, draft / 20), (draft, draft / 50), 4096)


CURVES = {
    "flat as on a GPU": cost_of(0.01e-3, knee=64, draft=0.2e-3),
    "steep as on a CPU": cost_of(1.5e-3),
    "flat, then steep": cost_of(2e-3, knee=16),
}


def falling(rng: np.random.Generator, requests: int, nodes: int) -> np.ndarray:
    """Joint probabilities [requests, nodes] as trees have them, some padded."""
    joint = -np.sort(-(rng.random((requests, nodes)) ** 3), axis=1)
    joint[rng.random(joint.shape).cumsum(axis=1) > nodes * 0.4] = 0.0
    return joint


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seed", range(5))
def test_sizes_are_the_best_of_all(curve: str, seed: int) -> None:
    rng, cost = RNG(seed), CURVES[curve]
    joint = falling(rng, 3, 5)
    work, chooser = Work(3, 0, 0), Chooser(cost)
    sizes = chooser.sizes(list("abc"), joint, work)
    times, rate = cost.table(work, joint.size), chooser.rate(work)
    assert rate == pytest.approx(3 / times[0])

    def worth(choice: tuple[int, ...]) -> float:
        expected = sum(joint[row, :n].sum() for row, n in enumerate(choice))
        return expected - rate * times[sum(choice)]

    best = max(itertools.product(range(6), repeat=3), key=worth)
    assert worth(tuple(sizes)) == pytest.approx(worth(best))


@pytest.mark.parametrize("seed", range(10))
def test_best_nodes_on_noisy_times(seed: int) -> None:
    rng = RNG(seed)
    joint = falling(rng, 4, 9)
    times = np.maximum.accumulate(rng.random(37)) + 0.5
    expected, count = best_nodes(joint, times, rate=4.0)
    ordered = np.sort(joint.ravel())[::-1]
    worth = [
        ordered[:n].sum() - 4.0 * times[n] for n in range(int((ordered > 0).sum()) + 1)
    ]
    assert expected - 4.0 * times[count] == pytest.approx(max(worth))


def steps(count: int):
    """Drafts of one request whose text repeats itself now and then."""
    rng = RNG(0)
    for _ in range(count):
        base = 0.97 if rng.random() < 0.2 else 0.55
        yield base ** np.arange(1.0, 33.0)[None]


@pytest.mark.slow
@pytest.mark.parametrize("curve", ["steep as on a CPU", "flat, then steep"])
def test_over_many_steps_it_is_as_fast_as_can_be(curve: str) -> None:
    """And faster than each step at its own best."""
    cost, work = CURVES[curve], Work(1, 0, 0)
    times = cost.table(work, 32)

    def speed(choose) -> float:
        tokens = seconds = 0.0
        for joint in steps(2000):
            nodes = choose(joint)
            got, took = 1.0 + joint[0, :nodes].sum(), times[nodes]
            tokens, seconds = tokens + got, seconds + took
            chooser.earned(1, got, work, took)
        return tokens / seconds

    def fixed(rate: float):
        return lambda joint: best_nodes(joint, times, rate)[1]

    chooser = Chooser(cost)
    ours = speed(lambda joint: int(chooser.sizes(["a"], joint, work)[0]))
    greedy = speed(
        lambda joint: int(((1 + joint.cumsum().astype(float)) / times[1:]).argmax()) + 1
    )
    best = max(speed(fixed(rate)) for rate in np.linspace(0.5, 3.0, 26) / times[0])
    assert ours > 0.99 * best
    assert ours > 1.01 * greedy


def test_prompts_do_not_change_what_a_second_is_worth() -> None:
    chooser = Chooser(CURVES["steep as on a CPU"])
    before = chooser.rate(Work(4, 0, 0))
    for _ in range(100):
        chooser.earned(4, 4, Work(304, 300, 0), 1.0)
    assert chooser.rate(Work(4, 0, 0)) == before
    assert chooser.rate(Work(304, 300, 0)) == before
    for _ in range(100):
        chooser.earned(4, 4, Work(4, 0, 0), 1.0)  # slower than without drafts
    assert chooser.rate(Work(4, 0, 0)) == before
    for _ in range(400):
        chooser.earned(4, 12, Work(9, 0, 0), 2 * 4 / before)
    assert chooser.rate(Work(5, 0, 0)) == pytest.approx(
        1.5 * 5 / chooser.cost.seconds(Work(5, 0, 0)), rel=0.01
    )


def ids(count: int) -> list[str]:
    return [f"request {n}" for n in range(count)]


def plan(chooser: Chooser, count: int, backlog: int = 3, open_: float = 0.9):
    return chooser.plan(
        ids(count),
        np.full(count, open_),
        np.zeros((count, 0)),
        np.full(count, backlog),
        Work(count, 0, 0),
    )


@pytest.mark.parametrize(
    ("curve", "requests", "asked"),
    [
        ("flat as on a GPU", 1, 1),
        ("flat as on a GPU", 32, 32),
        ("steep as on a CPU", 1, 1),
        ("steep as on a CPU", 32, 0),
        ("flat, then steep", 1, 1),
        ("flat, then steep", 64, 0),
    ],
)
def test_the_load_decides_whether_the_head_is_asked(
    curve: str, requests: int, asked: int
) -> None:
    assert plan(Chooser(CURVES[curve]), requests).ask.sum() == asked


def test_nothing_is_drafted_where_drafting_costs_too_much() -> None:
    chooser = Chooser(cost_of(0.01e-3, knee=64, draft=50e-3))
    assert not plan(chooser, 1).ask.any()
    assert not plan(chooser, 8).ask.any()


def test_a_request_that_cannot_be_made_up_for_is_not_asked_for() -> None:
    chooser = Chooser(CURVES["flat as on a GPU"])
    waiting = np.array([2, -1, 0])
    asked = chooser.plan(
        ids(3), np.full(3, 0.9), np.zeros((3, 0)), waiting, Work(3, 0, 0)
    ).ask
    assert asked.tolist() == [True, False, True]


def test_where_the_text_says_enough_the_head_is_not_asked() -> None:
    """Context nodes of 0.98 leave it 0.02 to find."""
    chooser = Chooser(CURVES["steep as on a CPU"])
    context = 0.98 ** np.arange(1.0, 17.0)[None]
    asked = chooser.plan(["a"], np.array([0.02]), context, np.array([3]), Work(1, 0, 0))
    assert not asked.ask.any()
    assert plan(chooser, 1).ask.all()


def test_the_head_is_probed_and_ever_more_rarely() -> None:
    chooser = Chooser(CURVES["steep as on a CPU"])
    probes = [step for step in range(1000) if plan(chooser, 32).ask.any()]
    assert 3 <= len(probes) <= 8
    gaps = np.diff(probes)
    assert (gaps[1:] >= gaps[:-1]).all()
    assert plan(chooser, 1).ask.all()  # the load has fallen: at once


def test_a_small_difference_changes_no_mind() -> None:
    """Speeds that differ by less than a hundredth: what was done is done again."""
    flips = {}
    for asking in (True, False):
        chooser = Chooser(cost_of(0.01e-3, knee=64))
        chooser._asking = asking
        # Find the cost of a level at which asking is worth as much as not asking.
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            chooser.cost._mean[-2], chooser._asking = middle, asking
            low, high = (middle, high) if plan(chooser, 4).ask.all() else (low, middle)
        flips[asking] = low
    assert flips[True] > flips[False] * 1.005


def test_what_the_head_adds_is_learned() -> None:
    chooser = Chooser(CURVES["flat, then steep"])
    assert plan(chooser, 4).ask.any()
    for _ in range(100):
        chosen = plan(chooser, 4)
        joint = np.full((4, 5), 1e-3)  # it hardly ever adds anything
        chooser.learn_gain(
            chosen, np.full(4, 0.9), np.zeros((4, 0)), joint, Work(4, 0, 0), 5, 100
        )
    assert not plan(chooser, 4).ask.any()


def test_levels_must_pay_for_the_rows_that_verify_them_too() -> None:
    """The same candidates: where rows cost more, a level needs more to start from."""
    limits = []
    for row in (0.01e-3, 3e-3):
        chooser = Chooser(cost_of(row, knee=1))
        for _ in range(100):
            joint = np.array([[0.6, 0.3, 0.2, 0.1]])
            chooser.learn_gain(
                plan(chooser, 1),
                np.ones(1),
                np.zeros((1, 0)),
                joint,
                Work(1, 0, 0),
                5,
                9,
            )
        limits.append(plan(chooser, 1).level_mass)
    assert 1.3 * limits[0] < limits[1] < 0.5


def test_requests_are_trusted_by_what_became_of_their_drafts() -> None:
    chooser = Chooser(CURVES["flat, then steep"])
    for _ in range(50):
        chooser.accepted("good", expected=1.0, accepted=2)
        chooser.accepted("bad", expected=1.0, accepted=0)
    good, bad, new = chooser.trust(["good", "bad", "new"])
    assert bad < new == 1.0 < good
    joint = np.tile(np.array([0.5, 0.3, 0.2, 0.1, 0.05]), (2, 1))
    joint = np.repeat(joint, 4, axis=1)
    sizes = chooser.sizes(["good", "bad"], joint, Work(2, 0, 0))
    assert sizes[0] > sizes[1]
    chooser.forget("bad")
    assert chooser.trust(["bad"]) == 1.0
