# SPDX-License-Identifier: Apache-2.0
"""Damaged heads are refused, with what is at fault, before any process starts."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, save_random_head
from vllm.engine.arg_utils import EngineArgs

from vllm_clover2.integration.draft_model import _checked
from vllm_clover2.model import Clover2Config

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


def repeated(weights: Weights) -> None:
    weights["draft_vocab_ids"][1] = weights["draft_vocab_ids"][0]


def outside(weights: Weights) -> None:
    weights["draft_vocab_ids"][-1] = 512


DAMAGE: dict[str, tuple[Callable[[Weights], None] | None, str]] = {
    "none": (lambda weights: None, ""),
    "missing": (missing, "recurrent.step.bias"),
    "nan": (nan, "layers.1.mlp.up_proj.weight holds NaN"),
    "infinite": (infinite, "rab1.q_proj.bias holds NaN or infinity"),
    "unknown": (unknown, "recurrent.surprise.weight"),
    "wrong-shape": (wrong_shape, "recurrent.first.weight has shape (64, 64), expected"),
    "repeated-id": (repeated, "must be ascending ids below the vocabulary size 512"),
    "outside-id": (outside, "must be ascending ids below the vocabulary size 512"),
    "truncated": (None, "model.safetensors must be a whole"),
}


def save_damaged_head(folder: Path, name: str) -> Path:
    file = save_random_head(folder, TinyModel(), draft_vocab_size=100)
    file /= "model.safetensors"
    damage = DAMAGE[name][0]
    if damage is None:
        os.truncate(file, file.stat().st_size // 2)
    else:
        weights = load_file(file)
        damage(weights)
        save_file(weights, file, metadata={"format": "pt"})
    return folder


def engine_config(target: Path, head: Path) -> Any:
    speculative = {"method": "clover2", "model": str(head)}
    args = EngineArgs(model=str(target), speculative_config=speculative)
    return args.create_engine_config()


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_weights(name: str, target: Path, tmp_path: Path) -> None:
    head = save_damaged_head(tmp_path, name)
    if name == "none":
        engine_config(target, head)
        return
    with pytest.raises(ValueError, match="head|model") as error:
        engine_config(target, head)
    assert DAMAGE[name][1] in str(error.value)


def test_no_weights(target: Path, tmp_path: Path) -> None:
    head = save_random_head(tmp_path, TinyModel())
    (head / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole"):
        engine_config(target, head)


@pytest.mark.parametrize(
    ("key", "value"), [("intermediate_size", 10**9), ("num_hidden_layers", 0)]
)
def test_impossible_sizes(target: Path, tmp_path: Path, key: str, value: int) -> None:
    head = save_random_head(tmp_path, TinyModel())
    path = head / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"{key} must be an integer in 1\.\."):
        engine_config(target, head)


BAD_CONFIGS = {
    "not-json": ('{"model_type": ', "config.json cannot be read"),
    "other-kind": ('{"model_type": "llama"}', "must be 'clover2', found 'llama'"),
    "not-an-object": ("[1]", "must be 'clover2', found None"),
}


@pytest.mark.parametrize(("content", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_damaged_config(
    target: Path, tmp_path: Path, content: str, message: str
) -> None:
    head = save_random_head(tmp_path, TinyModel())
    (head / "config.json").write_text(content)
    with pytest.raises(ValueError, match="head") as error:
        engine_config(target, head)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["none", "nan", "truncated", "outside-id"])
def test_damaged_weights_on_the_hub(
    name: str, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the cache of what was downloaded, as without a connection."""
    repository = tmp_path / f"models--org--{name}"
    save_damaged_head(repository / "snapshots" / "0123abcd", name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if name == "none":
        assert engine_config(target, Path(f"org/{name}")) is not None
        return
    with pytest.raises(ValueError, match="head|model") as error:
        engine_config(target, Path(f"org/{name}"))
    assert DAMAGE[name][1] in str(error.value)


@pytest.mark.parametrize("name", ["none", "nan", "wrong-shape", "outside-id"])
def test_weights_are_checked_when_loaded(name: str, tmp_path: Path) -> None:
    """Heads that only vLLM's loader can reach, in object storage for example."""
    head = save_damaged_head(tmp_path, name)
    config = Clover2Config.from_pretrained(head)
    weights = load_file(head / "model.safetensors")
    if name == "none":
        assert dict(_checked(weights.items(), config)).keys() == weights.keys()
        return
    with pytest.raises(ValueError, match="weights|ids") as error:
        list(_checked(weights.items(), config))
    assert DAMAGE[name][1] in str(error.value)
