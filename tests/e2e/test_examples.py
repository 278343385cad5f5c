# SPDX-License-Identifier: Apache-2.0
"""Example scripts that no other test runs, on a tiny target."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.slow


def test_step_time_prints_a_row_for_every_size(target: Path, head: Path) -> None:
    command = [sys.executable, EXAMPLES / "step_time.py"]
    command += ["--target", target, "--head", head]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [line.split()[1] for line in table.splitlines() if line.endswith("x │")]
    assert rows == ["1", "2", "4", "8", "16", "26", "32", "61", "64", "128", "256"]
