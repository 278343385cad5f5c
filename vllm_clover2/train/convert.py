# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the original Clover-2 project become heads of ours."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig

from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import (
    ConversionReport,
    from_reference,
    load_state_dict_file,
    save_head,
)

__all__ = ["convert"]


def convert(
    weights: Path,
    output: Path,
    config: Path | None = None,
    target: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> ConversionReport:
    """Convert a state dict and its config.json; write the head to `output`.

    With `target` (a folder or hub name) the head is refused unless it fits that
    model, and the model's shape is recorded in it.
    """
    config_path = config or weights.parent / "config.json"
    if not config_path.is_file():
        raise ValueError(
            f"{config_path} is missing; give the checkpoint's config.json with --config"
        )
    if not weights.is_file():
        raise ValueError(f"{weights} does not exist or is no file")
    try:
        reference_config = json.loads(config_path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_path} is not valid JSON: {error}") from error
    ours, state, report = from_reference(
        load_state_dict_file(weights), reference_config
    )
    if target is not None:
        shape = AutoConfig.from_pretrained(target).get_text_config()
        for key in ("hidden_size", "vocab_size"):
            if getattr(ours, key) != getattr(shape, key):
                raise ValueError(
                    f"the checkpoint's {key} must equal the target's "
                    f"{getattr(shape, key)}, found {getattr(ours, key)}; this head "
                    "was trained for another model"
                )
        ours.target = {
            "name": Path(target).name,
            "model_type": shape.model_type,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "vocab_size": shape.vocab_size,
        }
    model = Clover2Model(ours)
    model.load_state_dict(state)
    save_head(model, output, dtype)
    return report
