# SPDX-License-Identifier: Apache-2.0
"""What the files of a draft head must hold, checked wherever a head is read.

`heads add`, the configuration stage of serving (before any process starts) and training
use the same checks, so that each tells the same about a damaged head.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from vllm_clover2.heads import read_config_json
from vllm_clover2.model.clover2 import Clover2Model
from vllm_clover2.model.config import Clover2Config

__all__ = [
    "WEIGHTS_NAME",
    "check_draft_vocab",
    "check_head",
    "check_tensor",
    "expected_tensors",
    "read_config",
    "read_weights",
]

WEIGHTS_NAME = "model.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them

_Config = TypeVar("_Config", bound=PretrainedConfig)


def check_head(folder: Path) -> Clover2Config:
    """The config of the head in `folder`, after all of its files were checked.

    The weights are read once, tensor by tensor.

    Raises:
        ValueError: a file is missing or damaged, or the two do not fit each other; or
            weights are not finite, or draft vocabulary ids are not those of tokens.
    """
    config = read_config(folder, Clover2Config)
    expected = expected_tensors(Clover2Model, config)
    ids = None
    for name, tensor in read_weights(folder, expected):
        if name == "draft_vocab_ids":
            ids = tensor
    check_draft_vocab(ids, config.vocab_size, str(folder))
    return config


def read_config(folder: Path, config_class: type[_Config]) -> _Config:
    """The config.json of a draft head, as a `config_class`.

    Raises:
        ValueError: there is none, it is of another kind, or it has impossible values.
    """
    read_config_json(folder, config_class.model_type)
    try:
        return config_class.from_pretrained(folder)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / 'config.json'} describes no draft head: {error}"
        ) from error


def expected_tensors(model_class: Any, config: Any) -> dict[str, torch.Tensor]:
    """The tensors, without values, that the weights file of `config` must hold."""
    with torch.device("meta"):
        model: nn.Module = model_class(config)
    return model.state_dict()


def read_weights(
    folder: Path, expected: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The checked tensors of `folder`; names, shapes and types before any value.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    path = folder / WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            problems = [
                _problem(name, found.get(name), expected.get(name))
                for name in sorted(expected.keys() | found.keys())
            ]
            if wrong := [problem for problem in problems if problem]:
                raise ValueError(
                    f"{path} must hold the weights that config.json beside it "
                    f"describes, but {'; '.join(wrong[:5])} ({len(wrong)} in all). "
                    "Copy or export the head again"
                )
            for name in expected:
                tensor = file.get_tensor(name)
                check_tensor(name, tensor, expected)
                yield name, tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but it cannot be read "
            f"({error}); it is missing, truncated or of another format. Copy or "
            "export the head again"
        ) from error


def _problem(
    name: str,
    found: Any,  # safetensors' slice, which has no public type
    expected: torch.Tensor | None,
) -> str | None:
    if expected is None:
        return f"{name} is no weight of it"
    if found is None:
        return f"{name} is missing"
    shape, kind = tuple(found.get_shape()), found.get_dtype()
    if shape != tuple(expected.shape):
        return f"{name} has shape {shape}, expected {tuple(expected.shape)}"
    if kind not in (_FLOATS if expected.is_floating_point() else ("I64",)):
        return f"{name} holds {kind}, expected {expected.dtype}"
    return None


def check_tensor(
    name: str, tensor: torch.Tensor, expected: dict[str, torch.Tensor]
) -> None:
    """Raise ValueError unless `tensor` is one of `expected` and finite."""
    wanted = expected.get(name)
    if wanted is None or wanted.shape != tensor.shape:
        shape = "no such tensor" if wanted is None else tuple(wanted.shape)
        raise ValueError(
            f"the head's weights must be those that its config.json describes, but "
            f"{name} has shape {tuple(tensor.shape)}, expected {shape}. Copy or export "
            "the head again"
        )
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"the head's weights must be finite, but {name} holds NaN or infinity; the "
            "file is damaged or the training diverged"
        )


def check_draft_vocab(
    ids: torch.Tensor | None,  # [draft_vocab_size] int64
    vocab_size: int,
    source: str,
) -> None:
    """Raise ValueError unless `ids` are ascending ids of the target's tokens."""
    if ids is not None and not (
        bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < vocab_size
    ):
        raise ValueError(
            f"draft_vocab_ids of {source} must be ascending ids below the vocabulary "
            f"size {vocab_size}, found {int(ids.min())}..{int(ids.max())} with "
            f"{len(ids) - len(ids.unique())} repeated. Copy or export the head again"
        )
