# SPDX-License-Identifier: Apache-2.0
"""The draft that a run begins with: a new one, or that of an earlier run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_clover2.train.architectures import ARCHITECTURES, Architecture, load_draft
from vllm_clover2.train.clover2 import Gains, measure_gains
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import AnswerSet
from vllm_clover2.train.hidden import Target

__all__ = ["Start", "frequent_tokens", "start_of"]


def frequent_tokens(
    counts: np.ndarray,  # [vocab_size] int64
    size: int,
) -> torch.Tensor:
    """The `size` most frequent ids [size] int64, ascending."""
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


@dataclass(frozen=True)
class Start:
    """A draft before its first step, and what follows from its vocabulary of D ids."""

    draft: Any  # a module with the target's device, in float32
    architecture: Architecture
    gains: Gains | None  # None: it starts as the original's
    earlier: dict[str, Any] | None  # what the run before it recorded
    lm_head: torch.Tensor  # [D, H] the target's rows of these ids
    # [V] int64: the draft's number of each of the target's ids, -1 if it has none
    index: torch.Tensor
    coverage: float  # share of the answers' tokens that have these ids


def start_of(
    config: TrainConfig,
    target: Target,
    answers: AnswerSet,
    train_indices: np.ndarray,  # [n] int64 answers that are trained on
) -> Start:
    """What `config` describes.

    Raises:
        ValueError: the head to start from is not of the described kind and shape.
    """
    gains = None
    if config.init_recurrence == "scaled":
        sample = torch.from_numpy(answers.tokens[:256].astype(np.int64))
        gains = measure_gains(target, sample.to(target.lm_head.device))
    counts = answers.output_counts(target.config.vocab_size, train_indices)
    architecture, earlier = ARCHITECTURES[config.architecture], None
    if config.start_from is not None:
        draft = _draft_of(config.start_from, config, target)
        earlier = draft.config.training
    else:
        ids = None
        if config.draft_vocab_size is not None:
            ids = frequent_tokens(counts, config.draft_vocab_size)
        draft = architecture.new(config, target, ids, gains)
    ids, lm_head = draft.draft_vocab_ids, target.lm_head
    if ids is None:
        ids = torch.arange(target.config.vocab_size)
    else:
        lm_head = target.lm_head[ids.to(target.lm_head.device)]
    index = torch.full_like(target.lm_head[:, 0], -1, dtype=torch.int64)
    index[ids.to(index.device)] = torch.arange(len(ids), device=index.device)
    coverage = float(counts[ids.cpu().numpy()].sum() / counts.sum())
    return Start(draft, architecture, gains, earlier, lm_head, index, coverage)


def _draft_of(folder: Path, config: TrainConfig, target: Target) -> Any:
    """The draft in `folder`, which must be the one that was described."""
    draft: Any
    draft, architecture = load_draft(folder, torch.float32, target)
    if architecture is not ARCHITECTURES[config.architecture]:
        raise ValueError(
            f"start_from {folder} is no {config.architecture} head; set architecture "
            "accordingly"
        )
    layers = config.aux_hidden_state_layers
    if layers and draft.config.aux_hidden_state_layers is None:
        draft.fuse_layers(layers)
        draft.to(target.lm_head.device)
    for setting, found in (
        ("num_layers", draft.config.num_hidden_layers),
        ("draft_vocab_size", draft.config.draft_vocab_size),
        (
            "aux_hidden_state_layers",
            getattr(draft.config, "aux_hidden_state_layers", None),
        ),
    ):
        wanted = getattr(config, setting)
        if found != wanted:
            raise ValueError(
                f"{setting} must be that of start_from, {found}, found {wanted}"
            )
    if config.architecture == "clover2":  # how deep it is trained from now on
        draft.config.num_draft_steps = config.num_draft_steps
    return draft.train()
