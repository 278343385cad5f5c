# SPDX-License-Identifier: Apache-2.0
"""Clover-2 in training: starting weights, forward pass, offline drafting."""

from typing import NamedTuple

import torch
from torch import nn

from vllm_clover2.model import (
    Clover2Config,
    Clover2Model,
    Packing,
    RegressiveAttentionBlock,
)
from vllm_clover2.model.layers import MakeProduct, plain_product
from vllm_clover2.ops import top_k_log_probs
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import Batch, next_in_text
from vllm_clover2.train.from_target import (
    layer_shape,
    rope_theta,
    start_layers,
    target_record,
)
from vllm_clover2.train.hidden import Target, TargetStates
from vllm_clover2.train.losses import LossRows
from vllm_clover2.tree import TopK

__all__ = [
    "Clover2Replay",
    "DraftVocabulary",
    "Gains",
    "HeadDraft",
    "TrainableClover2",
    "measure_gains",
    "new_clover2",
]

# Width of the uniform noise on identities, as in the original; there it is
# one-sided, here it is centred.
_NOISE = 0.01
# Size of the token's part in the states, at the start.  At 1 its own logit drowns
# all others: the first loss is 36 instead of 12.
_TOKEN_SHARE = 0.3


class TrainableClover2(nn.Module):
    """Forward pass of training: one call, so that it can be wrapped (DDP, AMP)."""

    def __init__(self, draft: Clover2Model) -> None:
        super().__init__()
        self.draft = draft

    def forward(
        self,
        states: TargetStates,
        embeddings: torch.Tensor,  # [N, H] of the next tokens
        packing: Packing,
        rows: LossRows,
    ) -> list[torch.Tensor]:  # outputs of the D steps at `rows` [R or num_later, H]
        """Teacher-forced: step i consumes the text's own token at t + i."""
        hidden = self.draft.fused(states.pre_norm, states.aux)
        augmented = self.draft.augment(hidden[None], embeddings[None], packing=packing)
        g = augmented[0, rows.position]
        outputs = [self.draft.recurrent.first(g)]
        g, position = g[: rows.num_later], rows.position[: rows.num_later]
        for step in range(1, rows.weight.shape[0]):
            # Rows whose t + i lies beyond their text have weight 0.
            reached = (position + step).clamp(max=len(embeddings) - 1)
            g, out = self.draft.recurrent.advance(g, embeddings[reached])
            outputs.append(out)
        return outputs


class DraftVocabulary:
    """The target's tokens that an offline draft scores."""

    def __init__(
        self,
        output: torch.Tensor,  # [Vd, H] their rows of the lm_head
        ids: torch.Tensor | None,  # [Vd] int64, None = the whole vocabulary
        make_product: MakeProduct = plain_product,
    ) -> None:
        self._logits = make_product(output, None)
        self._ids = ids

    def _top_k(self, out: torch.Tensor, k: int) -> TopK:
        """The k likeliest tokens, or all, after outputs [M, H]."""
        logits = self._logits(out)
        values, draft_ids = top_k_log_probs(logits, min(k, logits.shape[-1]))
        return TopK(values, self.token_ids(draft_ids))

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids if self._ids is None else self._ids[draft_ids]


class HeadDraft(DraftVocabulary):
    """A plain Clover-2 model as the draft that trees are grown from."""

    def __init__(
        self,
        model: Clover2Model,
        lm_head: torch.Tensor,  # [V, H]
        make_product: MakeProduct = plain_product,
    ) -> None:
        ids = model.draft_vocab_ids
        output = lm_head if ids is None else lm_head[ids]
        super().__init__(output, ids, make_product)
        self._recurrent = model.recurrent
        self._embeddings = lm_head  # [V, H]

    def first_top_k(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, TopK]:
        return hidden, self._top_k(self._recurrent.first(hidden), k)

    def advance_top_k(
        self, state: torch.Tensor, tokens: torch.Tensor, k: int
    ) -> tuple[torch.Tensor, TopK]:
        state, out = self._recurrent.advance(state, self._embeddings[tokens])
        return state, self._top_k(out, k)


class Clover2Replay:
    """Drafts at any position of recorded answers; see `architectures.Replay`."""

    def __init__(
        self,
        model: Clover2Model,
        target: Target,
        states: TargetStates,
        batch: Batch,
    ) -> None:
        dtype = model.norm.weight.dtype
        lm_head = target.lm_head.to(dtype)
        device = lm_head.device
        next_ids = next_in_text(batch.input_ids.to(device), batch.lengths)
        self._draft = HeadDraft(model, lm_head)
        self._starts = batch.starts.to(device)
        aux = [one.to(dtype) for one in states.aux]
        self._augmented = model.augment(
            model.fused(states.pre_norm.to(dtype), aux)[None],
            lm_head[next_ids][None],
            packing=Packing(batch.lengths),
        )[0]

    def at(
        self,
        answers: torch.Tensor,  # [B] int64, numbers in the batch
        roots: torch.Tensor,  # [B] int64, positions of the trees' roots
    ) -> tuple[HeadDraft, torch.Tensor]:  # and the states [B, H] to grow from
        return self._draft, self._augmented[self._starts[answers] + roots - 1]


class Gains(NamedTuple):
    """Scales of what takes in embeddings, say, which are far smaller than states."""

    rab1: float  # adds to pre-norm hidden states
    rab2: float  # adds to recurrent states, as large as post-norm hidden states
    inputs: float  # adds the target's input embeddings to post-norm hidden states
    fusion: float  # adds normed states of inner layers to pre-norm hidden states


def new_clover2(
    config: TrainConfig,
    target: Target,
    draft_vocab_ids: torch.Tensor | None,  # [draft_vocab_size] int64, ascending
    gains: Gains | None,  # None: start as the original does
) -> Clover2Model:
    """A head with the target's layer shape, started from the target's weights."""
    model = Clover2Model(
        Clover2Config(
            **layer_shape(target),
            num_hidden_layers=config.num_layers,
            rope_theta=rope_theta(config, target),
            num_draft_steps=config.num_draft_steps,
            aux_hidden_state_layers=config.aux_hidden_state_layers,
            draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
            target=target_record(target),
        )
    )
    if draft_vocab_ids is not None:
        model.draft_vocab_ids.copy_(draft_vocab_ids)
    _start_recurrence(model, gains)
    _start_from_target(model, target, config)
    return model


def _reference_start(block: RegressiveAttentionBlock) -> None:
    """Queries and keys are the input itself; the token adds nothing yet."""
    _noisy_identity(block.q_proj, 1.0)
    _noisy_identity(block.k_proj, 1.0)
    _noisy_identity(block.v_proj, 0.0)


def _scaled_start(block: RegressiveAttentionBlock, gain: float) -> None:
    """The token's embedding is added at a visible size, with weight near 1.

    Pre-norm states can be hundreds of times larger than embeddings (300x in
    SmolLM2-135M); started from zero, the token stays invisible for thousands of
    steps.  Equal biases of query and key start every cosine near 1, instead of
    at a random sign.
    """
    _noisy_identity(block.q_proj, 0.1)
    _noisy_identity(block.k_proj, 1.0)
    _noisy_identity(block.v_proj, 1.0)
    block.v_proj.weight.mul_(gain)
    nn.init.constant_(block.q_proj.bias, 0.5)
    nn.init.constant_(block.k_proj.bias, 0.5)


def _noisy_identity(linear: nn.Linear, scale: float) -> None:
    """scale * I (top-left where not square) plus noise, bias 0."""
    nn.init.eye_(linear.weight).mul_(scale)
    noise = torch.empty_like(linear.weight).uniform_(-_NOISE / 2, _NOISE / 2)
    linear.weight.add_(noise)
    nn.init.zeros_(linear.bias)


@torch.no_grad()
def _start_recurrence(model: Clover2Model, gains: Gains | None) -> None:
    """Starting weights of everything but the augmenting layers."""
    recurrent = model.recurrent
    if gains is None:
        _reference_start(model.rab1)
        _reference_start(recurrent.rab2)
    else:
        _scaled_start(model.rab1, gains.rab1)
        _scaled_start(recurrent.rab2, gains.rab2)
    _noisy_identity(recurrent.first, 1.0)
    _noisy_identity(recurrent.step, 1.0)  # [I | 0]: state first, embedding second


@torch.no_grad()
def measure_gains(
    target: Target,
    input_ids: torch.Tensor,  # [N] int64 of real text
) -> Gains:
    """Gains that bring embeddings to `_TOKEN_SHARE` of the states' size."""

    def size(rows: torch.Tensor) -> float:
        # The median: SmolLM2's first token is two hundred times the others.
        return float(rows.float().square().mean(-1).sqrt().median())

    states = target.states_of(target.hidden(input_ids, (len(input_ids),)))
    pre, post = size(states.pre_norm), size(states.post_norm)
    output = _TOKEN_SHARE / size(target.lm_head[input_ids])
    inputs = _TOKEN_SHARE / size(target.embeddings[input_ids])
    return Gains(
        rab1=pre * output,
        rab2=post * output,
        inputs=post * inputs,
        fusion=_TOKEN_SHARE * pre,
    )


@torch.no_grad()
def _start_from_target(
    model: Clover2Model, target: Target, config: TrainConfig
) -> None:
    for norm in (model.norm, model.recurrent.norm):
        norm.weight.copy_(target.norm.weight)
    start_layers(model.layers, target, config.init_layers)
