# SPDX-License-Identifier: Apache-2.0
"""Example scripts that no other test runs, on a tiny target."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def test_step_time_prints_every_size_and_part(target: Path, head: Path) -> None:
    command = [sys.executable, EXAMPLES / "step_time.py"]
    command += ["--target", target, "--head", head]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split()[1] for line in table.splitlines() if line.endswith("x │")]
    assert rows == ["1", "2", "4", "8", "16", "26", "32", "61", "64", "128", "256"]
    parts = [
        line[1:-1].split("│")
        for line in table[table.index("Parts of") :].splitlines()
        if line.startswith("│")
    ]
    names = [name.strip() for name, _, _ in parts]
    assert names == ["target, rows: 1", "target, rows: 26", "augment, rows: 3", "grow"]
    assert all(float(time) >= 0.0 for _, time, _ in parts)
    # Against both passes, and nothing against the draft's own parts.
    shares = [share.strip() for _, _, share in parts]
    assert [share.endswith("%") for share in shares] == [True, True, False, False]
