# SPDX-License-Identifier: Apache-2.0
"""Commands in the README and in the cards of heads are ones that exist."""

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_clover2 import cli
from vllm_clover2.heads import SHIPPED

REPO = Path(__file__).parents[2]
DOCUMENTS = [REPO / "README.md", *sorted(SHIPPED.glob("*/README.md"))]


def documented(start: str) -> list[list[str]]:
    """Words of the commands that begin with ``start``, continued lines joined."""
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"\\\n\s*", "", path.read_text())
        lines = [line.strip() for line in text.splitlines() if line[:4] == " " * 4]
        commands = [line for line in lines if line.startswith(start)]
        found += [shlex.split(command, comments=True) for command in commands]
    return found


@pytest.mark.parametrize(
    "words",
    [
        *(words[1:] for words in documented("vllm-clover2 ")),
        *(
            words[words.index("vllm_clover2.cli") + 1 :]
            for words in documented("torchrun ")
        ),
    ],
    ids=" ".join,
)
def test_commands_have_valid_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_clover2.train.config.find_spec", lambda _: object())
    arguments = cli._parser().parse_args(words)
    if hasattr(arguments, "settings"):
        cli._settings_of(arguments)


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, REPO / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "words",
    [words for words in documented("python examples/") if "--" in " ".join(words)],
    ids=" ".join,
)
def test_example_scripts_know_their_options(words: list[str]) -> None:
    for word in words[2:]:
        if word.startswith("--"):
            assert word in help_of(words[1])
