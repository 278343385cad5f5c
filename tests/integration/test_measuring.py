# SPDX-License-Identifier: Apache-2.0
"""What a step costs is measured so that a busy moment does not decide it."""

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from vllm_clover2.integration import drafter as drafter_module
from vllm_clover2.integration.drafter import Drafter, median_seconds
from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.step_cost import Work


def test_a_busy_moment_meets_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    now, runs = 0.0, 0

    def part(seconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now, runs
            # The first round compiles; later the machine is busy for three runs.
            now += seconds * (100 if runs < 2 else 10 if 4 <= runs < 7 else 1)
            runs += 1

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert median_seconds([part(1.0), part(2.0)], rounds=5) == [1.0, 2.0]
    assert runs == 2 * 6


@pytest.mark.parametrize(
    ("slope", "limit", "largest"),
    [(1e-6, 8192, 1024), (1e-3, 8192, 128), (1.0, 8192, 64), (1e-6, 100, 64)],
    ids=["quick", "slow", "very-slow", "small-steps"],
)
def test_measuring_stops_at_passes_that_take_long(
    slope: float, limit: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass over all rows of a step took half a minute on a slow machine."""
    now = 0.0
    passes: list[int] = []

    def pass_rows(rows: int) -> None:
        nonlocal now
        now += slope * rows
        passes.append(rows)

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    drafter = Drafter()
    drafter.options, drafter.max_num_tokens = TreeOptions(), limit
    drafter.device = torch.device("cpu")
    group = SimpleNamespace(broadcast=lambda tensor: tensor)
    monkeypatch.setattr(drafter_module, "get_world_group", lambda: group)
    cost = drafter.measure_cost(pass_rows)
    assert cost is not None
    assert max(passes) == largest
    for rows in (1, 3, 64, limit):
        assert cost.seconds(Work(rows, 0, 0)) == pytest.approx(slope * rows, rel=1e-6)
