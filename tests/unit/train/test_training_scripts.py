# SPDX-License-Identifier: Apache-2.0
"""The example scripts around training, on a tiny target."""

import sys
from pathlib import Path

import ablation
import draft_vocabulary
import pytest
from tiny_models import TINY_TRAINING

from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.loop import train

pytestmark = pytest.mark.slow


def run(
    script: object, arguments: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


def cells(printed: str, name: str) -> list[str]:
    """The row of a table that starts with `name`."""
    rows = [line.strip("│ ").split("│") for line in printed.splitlines()]
    (row,) = [row for row in rows if row[0].strip() == name]
    return [cell.strip() for cell in row[1:]]


def test_ablation_trains_each_variant_with_each_seed_once(
    tiny_target: Path,
    tiny_answers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ablation, "BASE", TINY_TRAINING)
    calls: list[TrainConfig] = []
    monkeypatch.setattr(ablation, "train", lambda c: calls.append(c) or train(c))
    arguments = ["--target", tiny_target, "--answers", tiny_answers]
    arguments += ["--held-out", tiny_answers, "--output", tmp_path / "out"]
    arguments += ["--steps", 6, "--trees", "chain:2", "--variants", "base", "EAGLE-1"]
    run(ablation, arguments, monkeypatch)
    assert [(c.architecture, c.seed) for c in calls] == [
        ("clover2", 0),
        ("clover2", 1),
        ("eagle1", 0),
        ("eagle1", 1),
    ]
    first = cells(capsys.readouterr().out, "base")
    assert "±" in first[0]
    assert 0 <= float(first[1].split()[0]) <= 2
    run(ablation, arguments, monkeypatch)
    assert len(calls) == 4
    assert cells(capsys.readouterr().out, "base") == first
    head = tmp_path / "out" / "base-6-0" / "head"
    monkeypatch.setattr(ablation, "GOING_ON", {"learning_rate": 1e-9})
    arguments += ["--start-from", head, "--variants", "base", "--seeds", 0]
    run(ablation, arguments, monkeypatch)
    assert (calls[4].start_from, calls[4].learning_rate) == (head, 1e-9)
    further = cells(capsys.readouterr().out, "base")
    assert abs(float(further[1]) - float(first[1].split()[0])) < 0.5


def test_draft_vocabularies_are_compared(
    tiny_config: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    head = train(TrainConfig(**tiny_config.model_dump() | {"draft_vocab_size": 40}))
    arguments = ["--target", tiny_config.target, "--head", head, "--sizes", 12, 48]
    arguments += ["--answers", tiny_config.answers, "--held-out", tiny_config.answers]
    run(draft_vocabulary, arguments, monkeypatch)
    printed = capsys.readouterr().out
    small, whole = cells(printed, "12"), cells(printed, "48")
    assert whole[:2] == ["100.0%", "100.0%"]
    assert float(small[0].rstrip("%")) < 100
