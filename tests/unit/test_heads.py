# SPDX-License-Identifier: Apache-2.0
"""The user's registry of heads."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_clover2 import heads

SHAPE = {"hidden_size": 8, "num_hidden_layers": 3, "vocab_size": 50}


@pytest.fixture(autouse=True)
def own_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the real registry or the shipped heads."""
    path = tmp_path / "config" / "heads.json"
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(path))
    monkeypatch.setattr(heads, "_SHIPPED", tmp_path / "shipped")
    return path


def make_head(folder: Path, name: str = "tiny", **changes: object) -> Path:
    folder.mkdir(parents=True)
    target = {"name": name, **SHAPE, **changes}
    config = {"model_type": "clover2", "target": target}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
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


def test_error_names_the_known_heads(tmp_path: Path) -> None:
    folder = make_head(tmp_path / "shipped" / "tiny-head")
    with pytest.raises(ValueError, match="heads add") as error:
        heads.find_head("org/unknown", {})
    assert f"tiny -> {folder}" in str(error.value)


def test_only_heads_can_be_added(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        heads.add_head("org/model", tmp_path / "nothing")
    folder = make_head(tmp_path / "llama")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="found 'llama'"):
        heads.add_head("org/model", folder)
    folder = make_head(tmp_path / "unfinished")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        heads.add_head("org/model", folder)


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
