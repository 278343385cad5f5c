# SPDX-License-Identifier: Apache-2.0
"""The user's registry of heads."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from vllm_clover2 import cli, heads
from vllm_clover2.model import Clover2Config, Clover2Model
from vllm_clover2.model.weights import save_head

SHAPE = {"hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 50}


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the real registry or the shipped heads."""
    path = tmp_path / "config" / "heads.json"
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(path))
    monkeypatch.setattr(heads, "SHIPPED", tmp_path / "shipped")
    return path


def make_head(folder: Path, name: str = "tiny", **changes: object) -> Path:
    config = Clover2Config(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_hidden_layers=1,
        target={"name": name, **SHAPE, **changes},
    )
    save_head(Clover2Model(config), folder, torch.float32)
    return folder


def test_added_head_is_found_listed_and_forgotten(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "head", name="something else")
    heads.add_head("org/model", folder)
    assert heads.find_head("org/model", {}) == folder
    assert [head.target for head in heads.known_heads()] == ["org/model"]
    heads.remove_head("org/model")
    assert heads.known_heads() == []


def test_a_target_folder_is_known_by_any_spelling_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_head(tmp_path / "head", name="something else")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    heads.add_head("./model/", folder)
    assert heads.find_head(str(tmp_path / "model"), {}) == folder


def test_shipped_head_matches_by_name_and_shape(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "shipped" / "tiny-head")
    config = SimpleNamespace(**SHAPE)
    assert heads.find_head("/anywhere/tiny", config) == folder
    assert heads.find_head("org/Tiny", SHAPE) == folder
    with pytest.raises(ValueError, match="no Clover-2 head is known"):
        heads.find_head("org/other", config)
    with pytest.raises(ValueError, match="no Clover-2 head is known"):
        heads.find_head("org/tiny", {**SHAPE, "hidden_size": 9})


def test_the_users_own_head_comes_before_a_shipped_one(tmp_path: Path) -> None:
    make_head(tmp_path / "shipped" / "tiny-head")
    mine = make_head(tmp_path / "mine")
    heads.add_head("org/tiny", mine)
    assert heads.find_head("org/tiny", SHAPE) == mine


def test_error_names_the_known_heads_and_the_way_to_one(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "shipped" / "tiny-head")
    with pytest.raises(ValueError, match="no Clover-2 head is known") as error:
        heads.find_head("org/unknown", {})
    assert f"tiny -> {folder}" in str(error.value)
    lines = [line.split() for line in str(error.value).splitlines()]
    commands = [words[1:] for words in lines if words[0] == "vllm-clover2"]
    assert [words[0] for words in commands] == ["generate", "train", "heads"]
    for words in commands:
        cli._parser().parse_args(words)  # exits where an option does not exist
        assert "org/unknown" in words
    (flag, options) = lines[-1][0], " ".join(lines[-1][1:])
    assert flag == "--speculative-config"
    assert json.loads(options.strip("'")) == {"method": "clover2", "model": "none"}


@pytest.mark.parametrize("damage", ["deleted", "not-json", "not-an-object"])
def test_a_stale_entry_hides_no_other_head(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    shipped = make_head(tmp_path / "shipped" / "tiny-head")
    gone = make_head(tmp_path / "gone")
    heads.add_head("org/another", gone)
    if damage == "deleted":
        shutil.rmtree(gone)
    else:
        content = "{" if damage == "not-json" else "[1]"
        (gone / "config.json").write_text(content)
    assert heads.find_head("org/tiny", SHAPE) == shipped
    assert "heads remove org/another" in caplog.text
    assert [head.problem is None for head in heads.known_heads()] == [False, True]
    # For its own target it is no detail: another head would be a surprise.
    with pytest.raises(ValueError, match="heads remove org/another"):
        heads.find_head("org/another", SHAPE)


def test_only_heads_can_be_added(tmp_path: Path, own_registry: Path) -> None:
    folder = make_head(tmp_path / "llama")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="found 'llama'"):
        heads.add_head("org/model", folder)
    folder = make_head(tmp_path / "unfinished")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole"):
        heads.add_head("org/model", folder)
    assert not own_registry.exists()


def test_a_head_of_the_hub_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the hub's cache, as without a connection."""
    repository = tmp_path / "hub" / "models--org--head"
    folder = make_head(repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert heads.add_head("org/model", "org/head").folder == folder
    assert heads.find_head("org/model", {}) == folder
    for unknown in ("org/other-head", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match="no such folder, and the hub does not"):
            heads.add_head("org/model", unknown)


def test_removing_an_unknown_target_says_what_there_is(tmp_path: Path) -> None:
    heads.add_head("org/model", make_head(tmp_path / "head"))
    with pytest.raises(ValueError, match="org/model"):
        heads.remove_head("org/other")


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_damaged_registry_is_reported_and_kept(
    own_registry: Path, content: str
) -> None:
    own_registry.parent.mkdir()
    own_registry.write_text(content)
    with pytest.raises(ValueError, match="head registry"):
        heads.known_heads()
    assert own_registry.read_text() == content


def test_registry_follows_xdg_config_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CLOVER2_HEADS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert heads.registry_path() == tmp_path / "vllm-clover2" / "heads.json"
