# SPDX-License-Identifier: Apache-2.0
"""A short soak; ``make soak`` runs a long one."""

from pathlib import Path

import pytest
from engines import EnginePool
from soak import ROUND, Soak


@pytest.mark.slow
def test_soak(engines: EnginePool, target: Path, head: Path) -> None:
    soak = Soak.start(1, engines, target, head)
    soak.run(first=0, rounds=6)
    assert soak.seen["requests"] + soak.seen["aborted"] == 6 * ROUND
    for event in ("planted", "moved", "preempted", "aborted", "prefix hits"):
        assert soak.seen[event], event
