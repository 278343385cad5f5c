# SPDX-License-Identifier: Apache-2.0
"""What a step costs is measured so that a busy moment does not decide it."""

import time
from collections.abc import Callable

import pytest

from vllm_clover2.integration.drafter import median_seconds


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
