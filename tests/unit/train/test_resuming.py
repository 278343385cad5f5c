# SPDX-License-Identifier: Apache-2.0
"""A target is known again by its files."""

import shutil
from pathlib import Path

import pytest

from vllm_clover2.train.resuming import target_fingerprint

SIZE = 20 << 20  # large enough to be sampled


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(SIZE))
    return folder


def test_copies_are_the_same_target(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("a copy")
    assert target_fingerprint(str(copy)) == target_fingerprint(str(folder))


@pytest.mark.parametrize("at", [0, SIZE - 1], ids=["first-byte", "last-byte"])
def test_other_weights_are_another_target(folder: Path, at: int) -> None:
    before = target_fingerprint(str(folder))
    weights = bytearray(SIZE)
    weights[at] = 1
    (folder / "model.safetensors").write_bytes(weights)
    assert target_fingerprint(str(folder)) != before


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja"])
def test_other_configurations_are_another_target(folder: Path, name: str) -> None:
    before = target_fingerprint(str(folder))
    (folder / name).write_text('{"rope_theta": 1}')
    assert target_fingerprint(str(folder)) != before


def test_every_stretch_of_a_large_file_counts(folder: Path) -> None:
    """Training changes all of the weights; half a megabyte is surely seen."""
    before = target_fingerprint(str(folder))
    for start in range(0, SIZE, 1 << 19):
        weights = bytearray(SIZE)
        weights[start : start + (1 << 19)] = b"1" * (1 << 19)
        (folder / "model.safetensors").write_bytes(weights)
        assert target_fingerprint(str(folder)) != before
