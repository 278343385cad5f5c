# SPDX-License-Identifier: Apache-2.0
"""Damaged heads are refused when they are loaded, with the tensor that is at fault."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, save_random_head

Weights = dict[str, torch.Tensor]


def missing(weights: Weights) -> None:
    del weights["recurrent.step.bias"]


def nan(weights: Weights) -> None:
    weights["layers.1.mlp.up_proj.weight"][3, 5] = torch.nan


def infinite(weights: Weights) -> None:
    weights["rab1.q_proj.bias"][0] = torch.inf


def unknown(weights: Weights) -> None:
    weights["recurrent.surprise.weight"] = torch.zeros(3)


def wrong_shape(weights: Weights) -> None:
    weights["recurrent.first.weight"] = torch.zeros(64, 64)


DAMAGE: dict[str, tuple[Callable[[Weights], None] | None, str]] = {
    "none": (lambda weights: None, ""),
    "missing": (missing, "recurrent.step.bias"),
    "nan": (nan, "layers.1.mlp.up_proj.weight holds NaN"),
    "infinite": (infinite, "rab1.q_proj.bias holds NaN or infinity"),
    "unknown": (unknown, "recurrent.surprise.weight"),
    "wrong-shape": (wrong_shape, "recurrent.first.weight has shape (64, 64), expected"),
    "truncated": (None, "model.safetensors must be a whole"),
    "no-file": (None, "weights"),
}


@pytest.fixture(scope="module")
def refusals(
    target: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """What each damaged head is refused with."""
    folder = tmp_path_factory.mktemp("damaged")
    for name, (damage, _) in DAMAGE.items():
        file = save_random_head(folder / name, TinyModel()) / "model.safetensors"
        if damage is not None:
            weights = load_file(file)
            damage(weights)
            save_file(weights, file, metadata={"format": "pt"})
        elif name == "truncated":
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()
    answers = folder / "answers.json"
    script = Path(__file__).with_name("head_loading.py")
    heads = [str(folder / name) for name in DAMAGE]
    subprocess.run(
        [sys.executable, str(script), str(target), str(answers), *heads],
        env=os.environ
        | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        },
        check=True,
        timeout=400,
    )
    return dict(zip(DAMAGE, json.loads(answers.read_text()), strict=True))


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights(name: str, refusals: dict[str, str | None]) -> None:
    refusal = refusals[name]
    if name == "none":
        assert refusal is None
    else:
        assert refusal is not None
        assert DAMAGE[name][1] in refusal
