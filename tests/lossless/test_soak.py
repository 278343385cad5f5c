# SPDX-License-Identifier: Apache-2.0
"""A short soak; ``make soak`` runs a long one."""

from pathlib import Path

import pytest
from engines import EnginePool
from soak import ROUND, TREES, Soak, check_nothing_is_left
from wrong_engine import accept_paths

from vllm_clover2.integration import runner

EVENTS = (
    "planted rounds",
    "accepted",
    "moved",
    "preempted",
    "aborted",
    "prefix hits",
    "resets",
)
ENOUGH_FOR_MEMORY = 50
"""Rounds; the caches of five engines take half of them to fill."""


@pytest.fixture
def soak(
    pytestconfig: pytest.Config, engines: EnginePool, target: Path, head: Path
) -> Soak:
    return Soak.start(pytestconfig.getoption("--seed"), engines, target, head)


def test_soak(soak: Soak, pytestconfig: pytest.Config) -> None:
    first = pytestconfig.getoption("--first-round")
    rounds = -(-pytestconfig.getoption("--requests") // ROUND)
    soak.run(range(first, first + rounds))
    print(dict(soak.seen))
    assert soak.seen["finished"] + soak.seen["aborted"] == rounds * ROUND
    if rounds >= len(TREES):
        assert all(soak.seen[event] for event in EVENTS)
    if rounds >= ENOUGH_FOR_MEMORY:
        soak.check_memory()


def test_wrong_text_is_reported(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "accept_paths", accept_paths)
    with pytest.raises(AssertionError, match="; ours: ") as failure:
        soak.run(range(1))
    assert failure.value.__notes__ == [f"soak: --seed {soak.seed} --first-round 0"]


def test_requests_left_behind_are_reported(
    soak: Soak, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = soak.tested[0]
    monkeypatch.setitem(engine.runner.drafting._expected, "request-x", 0.5)
    with pytest.raises(AssertionError, match="still named in .*_expected"):
        check_nothing_is_left(engine)
