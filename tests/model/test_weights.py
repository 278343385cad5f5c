# SPDX-License-Identifier: Apache-2.0
"""Reading, writing and converting heads: what fits, and every way not to."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from vllm_clover2.model import Clover2Config, Clover2Model
from vllm_clover2.model.head_files import check_head
from vllm_clover2.model.weights import from_reference, load_head, save_head
from vllm_clover2.train.convert import convert

SMALL = {
    "vocab_size": 20,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 32,
}


def small_model(**changes: Any) -> Clover2Model:
    torch.manual_seed(0)
    return Clover2Model(
        Clover2Config(**SMALL, num_key_value_heads=1, num_hidden_layers=1, **changes)
    )


def reference_checkpoint() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint under the original's names, made from one of ours."""
    names = {
        "rab1.": "clover_head_mlp_rnn.",
        "recurrent.rab2.": "clover_head_mlp_rnn2.",
        "recurrent.first.": "clover_head_mlp.",
        "recurrent.step.": "clover_head_mlp2.",
        "recurrent.norm.": "clover_head_norm.",
        "norm.": "clover_norm.",
    }
    state = {}
    for name, tensor in small_model().state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                name = theirs + name[len(ours) :].replace("_proj", "")
                break
        state[name] = tensor
    state["lm_head.weight"] = torch.randn(20, 8)
    state["clover_embed_tokens.weight"] = state["lm_head.weight"].clone()
    config = {
        **SMALL,
        "num_key_value_heads": 1,
        "rope_theta": 5e5,
        "clover": {"num_heads": 3, "num_layers": 1},
    }
    return state, config


def test_heads_survive_writing_and_reading(tmp_path: Path) -> None:
    model = small_model(draft_vocab_size=4, rope_theta=1e5, target={"name": "x"})
    model.draft_vocab_ids.copy_(torch.tensor([1, 5, 6, 19]))
    save_head(model, tmp_path, torch.float32)
    found = load_head(tmp_path)
    assert found.config.rope_theta == 1e5
    assert found.config.target == {"name": "x"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert found.draft_vocab_ids.dtype == torch.int64
    assert isinstance(AutoConfig.from_pretrained(tmp_path), Clover2Config)


def test_only_floats_are_rounded(tmp_path: Path) -> None:
    save_head(small_model(draft_vocab_size=4), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.pop("draft_vocab_ids").dtype == torch.int64
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert not any("lm_head" in name or "embed" in name for name in stored)


def damage(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"norm\.weight is missing"),
        ({"norm.weight": torch.ones(9)}, r"has shape \(9,\), expected \(8,\)"),
        ({"extra": torch.ones(1)}, "extra is no weight"),
        ({"norm.weight": torch.ones(8).int()}, "holds I32, expected torch.float32"),
        ({"draft_vocab_ids": torch.ones(4)}, "holds F32, expected torch.int64"),
        ({"norm.weight": torch.full((8,), torch.nan)}, "holds NaN or infinity"),
        ({"norm.weight": torch.full((8,), -torch.inf)}, "holds NaN or infinity"),
        ({"draft_vocab_ids": torch.tensor([3, 1, 4, 5])}, "must be ascending"),
        ({"draft_vocab_ids": torch.tensor([1, 4, 4, 5])}, "with 1 repeated"),
        ({"draft_vocab_ids": torch.tensor([1, 2, 3, 20])}, "below the vocabulary"),
        ({"draft_vocab_ids": torch.tensor([-1, 2, 3, 4])}, "found -1"),
    ],
    ids=[
        *("missing", "shape", "unknown", "integers", "float-ids", "nan", "infinite"),
        *("unordered", "repeated", "outside", "negative"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    save_head(small_model(draft_vocab_size=4), tmp_path, torch.float32)
    damage(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_head(tmp_path)
    with pytest.raises(ValueError, match=message):
        check_head(tmp_path)


@pytest.mark.parametrize("read", [load_head, check_head])
def test_truncated_and_missing_files_are_named(
    tmp_path: Path, read: Callable[[Path], Any]
) -> None:
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read(tmp_path)
    save_head(small_model(), tmp_path, torch.float32)
    read(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    for size in (0, 7, 50, len(content) - 50):
        weights.write_bytes(content[:size])
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            read(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="No such file"):
        read(tmp_path)


@pytest.mark.parametrize("read", [load_head, check_head])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "must be 'clover2', found 'llama'"),
        ({"intermediate_size": 10**9}, "intermediate_size must be an integer in 1.."),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in 1..64"),
        ({"intermediate_size": 2**18}, r"has shape \(12, 8\), expected \(262144, 8\)"),
        ({"num_hidden_layers": 3}, r"layers\.1\..* is missing"),
        ({"vocab_size": 3}, "draft_vocab_size must lie in 1..vocab_size"),
        ({"hidden_size": "8"}, "hidden_size must be an integer"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_damaged_configs_are_refused(
    tmp_path: Path,
    read: Callable[[Path], Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    """Without building a model of such a size."""
    save_head(small_model(draft_vocab_size=4), tmp_path, torch.float32)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_the_shipped_head_is_whole(head_dir: Path) -> None:
    assert check_head(head_dir).draft_vocab_size == 8192


def test_failed_write_keeps_the_old_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_head(small_model(), tmp_path, torch.float32)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_clover2.model.weights.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_head(small_model(), tmp_path, torch.float32)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, "multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"num_hidden_layers": 0}, r"must be an integer in 1\.\.64, got 0"),
        ({"rms_norm_eps": 0.0}, "must be a positive number"),
        ({"rope_theta": float("inf")}, "must be a positive number"),
        ({"target": ["x"]}, "must be an object or null"),
        ({"draft_vocab_size": 21}, r"1\.\.vocab_size \(20\)"),
        ({"aux_hidden_state_layers": []}, "null or ascending numbers"),
        ({"aux_hidden_state_layers": [0, 1]}, "null or ascending numbers"),
        ({"aux_hidden_state_layers": [2, 1]}, "null or ascending numbers"),
        ({"aux_hidden_state_layers": 3}, "null or ascending numbers"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clover2Config(**{**SMALL, **changes})


def test_reference_checkpoint_converts_with_a_report(tmp_path: Path) -> None:
    state, config = reference_checkpoint()
    ours, converted, report = from_reference(state, config)
    assert ours.rope_theta == 10000.0
    assert "5" in report.derived["rope_theta"]
    assert ours.num_draft_steps == 3
    assert set(report.dropped) == {"lm_head.weight", "clover_embed_tokens.weight"}
    assert report.missing == []
    assert "clover_norm.weight -> norm.weight" in str(report)
    for name, tensor in small_model().state_dict().items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_convert_writes_a_head(tmp_path: Path, suffix: str) -> None:
    state, config = reference_checkpoint()
    weights = tmp_path / f"weights{suffix}"
    if suffix == ".bin":
        torch.save(state, weights)
    else:
        save_file(state, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(weights, tmp_path / "head")
    assert load_head(tmp_path / "head").config.num_draft_steps == 3


def test_incomplete_or_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    state, config = reference_checkpoint()
    with pytest.raises(ValueError, match="'clover' section"):
        from_reference(state, SMALL)
    with pytest.raises(ValueError, match="rope_scaling"):
        from_reference(state, {**config, "rope_scaling": {"type": "linear"}})
    with pytest.raises(ValueError, match="must be \\[vocab_size, hidden_size\\]"):
        from_reference(state, {**config, "vocab_size": 21})
    with pytest.raises(ValueError, match="missing .*'norm.weight'"):
        from_reference(
            {k: v for k, v in state.items() if k != "clover_norm.weight"}, config
        )
    with pytest.raises(ValueError, match="unknown tensors .*'fc.weight'"):
        from_reference({**state, "fc.weight": torch.ones(1)}, config)
    with pytest.raises(ValueError, match="must have shape"):
        from_reference(state, {**config, "intermediate_size": 13})
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        convert(tmp_path / "weights.bin", tmp_path / "out")


def test_pickles_with_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(reference_checkpoint()[1]))
    weights = tmp_path / "weights.bin"
    torch.save({"x": Path("code")}, weights)
    with pytest.raises(ValueError, match="something else than plain tensors"):
        convert(weights, tmp_path / "out")


def test_fit_to_the_target_is_checked(tmp_path: Path) -> None:
    state, config = reference_checkpoint()
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = tmp_path / "target"
    target.mkdir()
    shape = {"model_type": "llama", **SMALL, "num_hidden_layers": 4}
    (target / "config.json").write_text(json.dumps(shape))
    convert(tmp_path / "weights.safetensors", tmp_path / "out", target=str(target))
    assert load_head(tmp_path / "out").config.target["num_hidden_layers"] == 4
    (target / "config.json").write_text(json.dumps({**shape, "hidden_size": 16}))
    with pytest.raises(ValueError, match="hidden_size must equal the target's 16"):
        convert(tmp_path / "weights.safetensors", tmp_path / "o2", target=str(target))
