# SPDX-License-Identifier: Apache-2.0
"""Widths on synthetic cost curves: what loads and acceptance make of them."""

import dataclasses

import numpy as np
import pytest

from vllm_clover2.tree.chooser import LAST_PROBE
from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.step_cost import StepCost, Work
from vllm_clover2.tree.types import MAX_NODES
from vllm_clover2.tree.widths import (
    Verified,
    WidthChooser,
    widths_at_start,
    widths_of,
)

NODES = 25
GOOD = 0.7 ** np.arange(1.0, NODES + 1)  # joint probabilities of a tree's nodes
BAD = 0.02 * GOOD


def cost_of(slope: float, knee: int) -> StepCost:
    """5 ms up to ``knee`` rows, then ``slope`` seconds for each further one."""
    rows = sorted({1, knee, 1024, 8192})
    seconds = [5e-3 + slope * max(0, n - knee) for n in rows]
    return StepCost(rows, seconds, (0.1e-3, 1e-7), (0.2e-3, 1e-6), 8192)


def gpu() -> StepCost:
    """Rows are nearly free up to where a GPU is busy computing."""
    return cost_of(20e-6, knee=256)


class Service:
    """Steps of equal requests, their drafts as good as is said.

    A step verifies what the one before has grown, and grows for the next one.
    """

    def __init__(self, cost: StepCost) -> None:
        self.cost = cost
        self.chooser = WidthChooser(cost, NODES, draft_rows=17)
        self._verified = self._grown = NODES
        self._due = 0.0

    def run(
        self, steps: int, requests: int, joint: np.ndarray, honest: float = 1.0
    ) -> list[int]:
        """Widths chosen; of what is expected so much comes true."""
        chosen = []
        plain = Work(requests, 0, 100 * requests)
        for _ in range(steps):
            work = dataclasses.replace(
                self.chooser.work(plain, self._verified),
                levels=int(self._grown > 0),
                grown=requests * int(self._grown > 0),
            )
            self._due += honest * requests * joint[: self._verified].sum()
            accepted = int(self._due)
            self._due -= accepted
            self.chooser.learn(
                Verified(
                    np.full(requests, self._verified),
                    work,
                    self.cost.seconds(work),
                    accepted,
                    requests if self._grown else 0,
                    joint * requests,
                )
            )
            self._verified, self._grown = self._grown, self.chooser.choose(plain)
            chosen.append(self._grown)
        return chosen


@pytest.mark.parametrize(
    ("cost", "requests", "widths"),
    [
        (cost_of(1e-9, knee=1), 64, {25}),
        (gpu(), 1, {25}),
        (gpu(), 8, {25}),
        (gpu(), 64, {2, 8}),
        (gpu(), 256, {0}),
        (cost_of(10e-3, knee=1), 1, {0}),
        (cost_of(1e-3, knee=1), 1, {2, 8}),
    ],
    ids=["flat", "gpu-1", "gpu-8", "gpu-64", "gpu-256", "very-steep", "steep"],
)
def test_the_load_decides(cost: StepCost, requests: int, widths: set[int]) -> None:
    chosen = Service(cost).run(100, requests, GOOD)[50:]
    if widths == {0}:  # but for probes
        assert chosen.count(0) > 45
    else:
        assert set(chosen) <= widths


def test_what_is_not_accepted_is_not_verified_for_long() -> None:
    service = Service(gpu())
    assert set(service.run(50, 32, GOOD)[20:]) == {8}
    assert set(service.run(200, 32, BAD)[-10:]) <= {0, 2}


def test_nodes_must_keep_what_they_promise() -> None:
    service = Service(cost_of(50e-6, knee=32))
    assert set(service.run(50, 8, GOOD)[20:]) == {8}
    assert set(service.run(200, 8, GOOD, honest=0.1)[-10:]) <= {0, 2}


def test_it_recovers_by_probes() -> None:
    service = Service(cost_of(50e-6, knee=32))
    lost = service.run(2000, 32, BAD)[-1000:]
    assert 0 < sum(width > 0 for width in lost) <= 2 * 1000 // LAST_PROBE + 1
    found = service.run(2 * LAST_PROBE + 100, 32, GOOD)
    assert set(found[-50:]) & {2, 8}
    assert 0 not in found[-50:]


def test_prompts_beside_do_not_count_as_requests() -> None:
    chooser = WidthChooser(gpu(), NODES, draft_rows=17)
    work = chooser.work(Work(504, 500, 9), 8)
    assert work == Work(536, 500, 9, augmented=536, levels=1, grown=4)
    assert chooser.work(Work(504, 500, 9), 25).augmented == 500 + 4 * 17
    assert chooser.work(Work(4, 0, 9), 0) == Work(4, 0, 9, augmented=4)
    assert chooser.choose(Work(1, 0, 9)) == NODES
    assert chooser.choose(Work(4096, 4000, 9)) < NODES


@pytest.mark.parametrize("nodes", [1, 2, 5, TreeOptions().num_nodes, MAX_NODES])
def test_widths_and_their_table(nodes: int) -> None:
    widths = widths_of(nodes)
    assert widths[0] == nodes
    assert widths[-1] == 0
    assert widths == sorted(set(widths), reverse=True)
    table = widths_at_start(nodes)
    assert [width for *_, width in table] == widths
    assert table[0][0] == 1
    assert all(a[1] + 1 == b[0] for a, b in zip(table, table[1:], strict=False))
    assert all(last * (1 + width) <= 512 for _, last, width in table)
