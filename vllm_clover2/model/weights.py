# SPDX-License-Identifier: Apache-2.0
"""Reading and writing heads, and conversion of the original project's weights."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig

from vllm_clover2.model.clover2 import Clover2Model
from vllm_clover2.model.config import REFERENCE_ROPE_THETA, Clover2Config
from vllm_clover2.model.head_files import (
    WEIGHTS_NAME,
    check_draft_vocab,
    expected_tensors,
    read_config,
    read_weights,
)

__all__ = [
    "ConversionReport",
    "from_reference",
    "load_head",
    "load_state_dict_file",
    "read_model",
    "save_head",
    "write_model",
]

_Model = TypeVar("_Model", bound=nn.Module)

# Reference module -> ours.  Both RABs have the same children.
_REFERENCE_MODULES = {
    "clover_head_mlp_rnn2": "recurrent.rab2",
    "clover_head_mlp_rnn": "rab1",
    "clover_head_mlp2": "recurrent.step",
    "clover_head_mlp": "recurrent.first",
    "clover_head_norm": "recurrent.norm",
    "clover_norm": "norm",
}
# Both are the target's own lm_head, which our heads do not carry.
_TARGET_TENSORS = ("lm_head.weight", "clover_embed_tokens.weight")


@dataclass
class ConversionReport:
    """What became of a reference checkpoint's tensors and settings."""

    taken: dict[str, str] = field(default_factory=dict)  # reference name -> ours
    derived: dict[str, str] = field(default_factory=dict)  # setting -> how
    dropped: dict[str, str] = field(default_factory=dict)  # tensor -> why
    missing: list[str] = field(default_factory=list)  # our tensors without a source

    def __str__(self) -> str:
        lines = [f"taken    {old} -> {new}" for old, new in self.taken.items()]
        lines += [f"derived  {key}: {how}" for key, how in self.derived.items()]
        lines += [f"dropped  {key}: {why}" for key, why in self.dropped.items()]
        lines += [f"missing  {key}" for key in self.missing]
        return "\n".join(lines)


def save_head(model: Clover2Model, folder: Path, dtype: torch.dtype) -> None:
    """Write a head in our own format; see `write_model`."""
    write_model(model, folder, dtype)


def write_model(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write `config.json` and `model.safetensors`, each replaced atomically.

    `model` is a module with a Hugging Face `config`. Floating-point tensors are
    stored as `dtype`.  When writing fails (a full disk, say) the files that were
    there before stay as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor)
        .detach()
        .cpu()
        .contiguous()
        for name, tensor in model.state_dict().items()
    }
    model.config.dtype = dtype
    partial = folder / f".{WEIGHTS_NAME}.partial"
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        model.config.save_pretrained(folder)
        os.replace(partial, folder / WEIGHTS_NAME)
    finally:
        partial.unlink(missing_ok=True)


def load_state_dict_file(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors or (weights-only) torch file."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, EOFError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a weights file ({error}); it is missing, "
            "truncated or of another format"
        ) from error
    except Exception as error:  # torch.load raises its pickle library's own types
        raise ValueError(
            f"{path} holds something else than plain tensors ({error})"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} must hold a state dict, found {type(state)}")
    return state


def load_head(folder: Path, dtype: torch.dtype = torch.float32) -> Clover2Model:
    """Read a head in our own format; every tensor must be there and fit."""
    return read_model(folder, Clover2Config, Clover2Model).to(dtype)


def read_model(
    folder: Path, config_class: type[PretrainedConfig], model_class: type[_Model]
) -> _Model:
    """A draft that `write_model` wrote; every tensor must be there and fit."""
    config = read_config(folder, config_class)
    state = dict(read_weights(folder, expected_tensors(model_class, config)))
    model = model_class(config)
    model.load_state_dict(state)
    check_draft_vocab(model.draft_vocab_ids, config.vocab_size, str(folder))
    return model


def from_reference(
    state_dict: dict[str, torch.Tensor], config: dict[str, Any]
) -> tuple[Clover2Config, dict[str, torch.Tensor], ConversionReport]:
    """Convert an original Clover-2 state dict and its config.json.

    `config` is the original's dict (Llama keys plus a `clover` sub-dict).
    Raises ValueError when tensors are missing, unknown or of a wrong shape.
    """
    report = ConversionReport()
    ours = _reference_config(config, report)
    state: dict[str, torch.Tensor] = {}
    unknown: list[str] = []
    for name, tensor in state_dict.items():
        if name in _TARGET_TENSORS:
            report.dropped[name] = "the head uses the target's own lm_head"
            _check_vocabulary(name, tensor, ours)
            continue
        if name.endswith("rotary_emb.inv_freq"):
            report.dropped[name] = "follows from rope_theta and head_dim"
            continue
        new = _our_name(name)
        if new is None:
            unknown.append(name)
            continue
        report.taken[name] = new
        state[new] = tensor
    expected = Clover2Model(ours).state_dict()
    report.missing = sorted(expected.keys() - state.keys())
    if unknown or report.missing:
        raise ValueError(
            "this is not a complete Clover-2 state dict: unknown tensors "
            f"{unknown[:5]}, missing (under our names) {report.missing[:5]}"
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} must have shape {tuple(expected[name].shape)} according to "
                f"the config, found {tuple(tensor.shape)}"
            )
    return ours, state, report


def _our_name(name: str) -> str | None:
    module, _, rest = name.partition(".")
    if module == "layers":
        return name
    if module not in _REFERENCE_MODULES:
        return None
    rest = re.sub(r"^(q|k|v)\.", r"\1_proj.", rest)
    return f"{_REFERENCE_MODULES[module]}.{rest}"


def _reference_config(
    config: dict[str, Any], report: ConversionReport
) -> Clover2Config:
    clover = config.get("clover")
    if not isinstance(clover, dict):
        raise ValueError(
            "a reference config has a 'clover' section (num_heads, num_layers); this "
            f"one has only {sorted(config)[:12]}"
        )
    scaling = config.get("rope_scaling")
    if scaling is not None:
        raise ValueError(
            f"reference heads with rope_scaling are not supported, got {scaling}"
        )
    kv_heads = config.get("num_key_value_heads")
    if kv_heads is None:
        kv_heads = config["num_attention_heads"]
        report.derived["num_key_value_heads"] = f"{kv_heads}, as num_attention_heads"
    report.derived["rope_theta"] = (
        f"{REFERENCE_ROPE_THETA:g}: the original ignores its config's "
        f"{config.get('rope_theta', 'unset')}"
    )
    report.derived["num_hidden_layers"] = f"{clover['num_layers']}, clover.num_layers"
    report.derived["num_draft_steps"] = f"{clover['num_heads']}, clover.num_heads"
    copied = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "rms_norm_eps",
        "max_position_embeddings",
    )
    absent = [key for key in copied if key not in config]
    if absent:
        raise ValueError(f"the reference config lacks {absent}")
    return Clover2Config(
        **{key: config[key] for key in copied},
        num_key_value_heads=kv_heads,
        rope_theta=REFERENCE_ROPE_THETA,
        num_hidden_layers=clover["num_layers"],
        num_draft_steps=clover["num_heads"],
    )


def _check_vocabulary(name: str, tensor: torch.Tensor, config: Clover2Config) -> None:
    expected = (config.vocab_size, config.hidden_size)
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"{name} must be [vocab_size, hidden_size] = {expected}, found "
            f"{tuple(tensor.shape)}"
        )
