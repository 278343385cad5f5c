# SPDX-License-Identifier: Apache-2.0
"""The drafts that can be trained and replayed, behind one interface."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from vllm_clover2.model.eagle1 import load_eagle1, save_eagle1
from vllm_clover2.model.weights import load_head, save_head
from vllm_clover2.train.clover2 import (
    Clover2Replay,
    Gains,
    TrainableClover2,
    new_clover2,
)
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import Batch
from vllm_clover2.train.eagle1 import Eagle1Replay, TrainableEagle1, new_eagle1
from vllm_clover2.train.hidden import Target, TargetStates
from vllm_clover2.tree.growth import Draft

__all__ = ["ARCHITECTURES", "Architecture", "Replay", "head_model_type", "load_draft"]


class Replay(Protocol):
    """Drafts at any position of the answers of one batch."""

    def at(
        self,
        answers: torch.Tensor,  # [B] int64, numbers in the batch
        roots: torch.Tensor,  # [B] int64, positions of the trees' roots
    ) -> tuple[Draft | None, torch.Tensor]:
        """A draft for one tree per root, and the states [B, H] to grow from.

        No draft: the text is the only source.
        """


@dataclass(frozen=True)
class Architecture:
    """What training and evaluation need to know of a kind of draft.

    Models have a `config` (vocab_size, hidden_size, draft_vocab_size, target,
    training) and `draft_vocab_ids` (int64, ascending, or None).
    """

    # (settings, target, draft_vocab_ids, gains) -> model
    new: Callable[[TrainConfig, Target, torch.Tensor | None, Gains | None], nn.Module]
    # model -> module with the signature of `TrainableClover2.forward`
    trainable: Callable[[Any], nn.Module]
    # target -> [V, H], rows that the draft reads tokens from
    embeddings: Callable[[Target], torch.Tensor]
    save: Callable[[Any, Path, torch.dtype], None]
    load: Callable[[Path, torch.dtype], nn.Module]
    # (model, target, states, batch) -> drafts at its positions
    replay: Callable[[Any, Target, TargetStates, Batch], Replay]


ARCHITECTURES = {
    "clover2": Architecture(
        new=new_clover2,
        trainable=TrainableClover2,
        embeddings=lambda target: target.lm_head,
        save=save_head,
        load=load_head,
        replay=Clover2Replay,
    ),
    "eagle1": Architecture(
        new=new_eagle1,
        trainable=TrainableEagle1,
        embeddings=lambda target: target.embeddings,
        save=save_eagle1,
        load=load_eagle1,
        replay=Eagle1Replay,
    ),
}


def head_model_type(folder: Path) -> str:
    """The model_type in the config.json of the head in `folder`.

    Raises:
        ValueError: there is none to be read.
    """
    path = folder / "config.json"
    try:
        return str(json.loads(path.read_text("utf-8"))["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must be a JSON object with a model_type, found {error!r}; give "
            "the folder of a clover2 head or of an EAGLE head of vLLM"
        ) from error


def load_draft(
    folder: Path, dtype: torch.dtype, target: Target
) -> tuple[nn.Module, Architecture]:
    """The draft in `folder`, in evaluation mode, and its kind.

    `target` gives the states that it reads from now on.

    Raises:
        ValueError: it is no draft, or not one for this target.
    """
    model_type = head_model_type(folder)
    architecture = ARCHITECTURES.get({"llama": "eagle1"}.get(model_type, model_type))
    if architecture is None:
        raise ValueError(
            f"{folder} is no draft head: its model_type must be clover2, or llama for "
            f"an EAGLE-1 head, found {model_type!r}"
        )
    model: Any = architecture.load(folder, dtype)
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(model.config, key), getattr(target.config, key)
        if ours != theirs:
            raise ValueError(
                f"the head's {key} must equal the target's {theirs}, found {ours}; "
                "use the head that was trained for this target"
            )
    target.read_layers(getattr(model.config, "aux_hidden_state_layers", None))
    return model.to(target.lm_head.device).eval(), architecture
