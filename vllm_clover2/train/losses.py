# SPDX-License-Identifier: Apache-2.0
"""Training losses of Clover-2, computed only for the rows that count.

Step i at position t imitates the target's post-norm state Y at t + i and is
weighted by the loss mask M there:

    w = M[t+i] * C[i,t]         Z_i = sum(w) + 1     (sums over the whole batch)
    vloss_i = sum mean_H(w * smooth_l1(o - Y)) / Z_i
    ploss_i = -sum w * <softmax(W Y), log_softmax(W o)> / Z_i
    loss = sum_i decay^i * (value_weight * vloss_i + prob_weight * ploss_i)

With a reduced draft vocabulary W holds only its rows, so both distributions are
renormalised over it; with the whole lm_head this is the original's loss exactly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["DraftLoss", "LossRows", "LossWeights", "draft_loss", "label_agreement"]

# Rows of logits held at once: 512 x 8,192 floats stay in a CPU's last-level cache.
_CHUNK_LOGITS = 512 * 8192


@dataclass(frozen=True)
class LossWeights:
    value: float = 10.0
    prob: float = 1.0
    decay: float = 0.7


def _shift_steps(
    flags: torch.Tensor,  # [B, T] bool
    num_steps: int,
) -> torch.Tensor:  # [D, B, T] bool: step i holds flags[:, t + i]
    length = flags.shape[1]
    return torch.stack(
        [F.pad(flags[:, step:], (0, min(step, length))) for step in range(num_steps)]
    )


@dataclass(frozen=True)
class LossRows:
    """The rows (sequence, position) where at least one step has a loss."""

    batch: torch.Tensor  # [R] int64
    position: torch.Tensor  # [R] int64, t
    weight: torch.Tensor  # [D, R] float32, w of step i
    label: torch.Tensor  # [D, R] int64, number of t + i among `label_*`, or 0
    label_batch: torch.Tensor  # [S] int64, the positions with M = 1
    label_position: torch.Tensor  # [S] int64

    @classmethod
    def build(
        cls,
        loss_mask: torch.Tensor,  # [B, T] bool, M; 0 from each last position on
        num_steps: int,
        agreement: torch.Tensor | None = None,  # [B, T] bool, c of `label_agreement`
    ) -> "LossRows":
        mask = loss_mask.bool()
        # shifted[i, b, t] = M[b, t + i], zero past the end.
        shifted = _shift_steps(mask, num_steps)
        weight = shifted.float()
        if agreement is not None:
            along = _shift_steps(agreement.bool(), num_steps)
            weight = weight * along.cumprod(dim=0)
        batch, position = shifted.any(dim=0).nonzero(as_tuple=True)
        number = torch.zeros_like(mask, dtype=torch.int64)
        number[mask] = torch.arange(int(mask.sum()), device=mask.device)
        steps = torch.arange(num_steps, device=mask.device)[:, None]
        reached = (position + steps).clamp(max=mask.shape[1] - 1)
        return cls(
            batch,
            position,
            weight[:, batch, position],
            number[batch, reached],
            *mask.nonzero(as_tuple=True),
        )


@dataclass(frozen=True)
class DraftLoss:
    loss: torch.Tensor  # scalar
    ploss: torch.Tensor  # [D]
    vloss: torch.Tensor  # [D]
    weight: torch.Tensor  # [D] sum of w
    agreed: torch.Tensor | None  # [D] sum of w where both argmaxes are the same


_ChunkTerms = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    tuple[torch.Tensor, torch.Tensor],
]


def _chunk_terms(
    logits: torch.Tensor,  # [C, V]
    labels: torch.Tensor,  # [S, V] probabilities
    label: torch.Tensor,  # [C] rows of `labels`
    weight: torch.Tensor,  # [C] float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross entropy of a chunk, and its gradient by the logits [C, V]."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    wanted = labels[label].float()
    loss = -torch.sum((wanted * log_probs).sum(-1) * weight)
    difference = (log_probs.exp() - wanted) * weight[:, None]
    return loss, difference.to(logits.dtype)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    """[C, V] -> [C, V] in the same dtype, computed in float32."""
    return torch.softmax(logits.float(), dim=-1).to(logits.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """One pass over the logits instead of ten: 5x less CPU time for 8,192 tokens."""
    return torch.compile(function, dynamic=True)


class _SoftCrossEntropy(torch.autograd.Function):
    """sum_r w_r * CE(labels_r, W o_r), with the gradient made on the way.

    The logits of all rows never exist at once: each chunk is reduced to its
    loss and to d loss / d o immediately.  W is frozen and gets no gradient.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        outputs: torch.Tensor,  # [R, H]
        lm_head: torch.Tensor,  # [V, H]
        labels: torch.Tensor,  # [S, V] probabilities
        label: torch.Tensor,  # [R] rows of `labels`
        weight: torch.Tensor,  # [R] float32
        count_agreed: bool,
        chunk_terms: _ChunkTerms,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(outputs)
        loss = outputs.new_zeros((), dtype=torch.float32)
        agreed = outputs.new_zeros((), dtype=torch.float32)
        chunk = max(1, _CHUNK_LOGITS // lm_head.shape[0])
        for start in range(0, outputs.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = outputs[part].to(lm_head.dtype) @ lm_head.T
            terms = chunk_terms(logits, labels, label[part], weight[part])
            loss += terms[0]
            gradient[part] = terms[1] @ lm_head
            if count_agreed:
                same = logits.argmax(-1) == labels[label[part]].argmax(-1)
                agreed += torch.sum(weight[part] * same)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agreed)
        return loss, agreed

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_loss: torch.Tensor,
        _grad_agreed: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, None, None, None, None, None, None


def draft_loss(
    outputs: torch.Tensor,  # [D, R, H] the steps' outputs at `rows`
    targets: torch.Tensor,  # [B, T, H] Y: post-norm target states, one ahead
    rows: LossRows,
    lm_head: torch.Tensor,  # [V or draft_vocab_size, H]
    weights: LossWeights,
    count_agreed: bool = False,
    compiled: bool = False,
) -> DraftLoss:
    """Both losses of every step, normalised over the batch."""
    chunk_terms = _compiled(_chunk_terms) if compiled else _chunk_terms
    states = targets[rows.label_batch, rows.label_position]  # [S, H]
    with torch.no_grad():
        labels = _soft_labels(states, lm_head, compiled)
    plosses, vlosses, agreements = [], [], []
    for step, out in enumerate(outputs):
        weight, label = rows.weight[step], rows.label[step]
        normaliser = weight.sum() + 1.0
        ce, agreed = _SoftCrossEntropy.apply(
            out, lm_head, labels, label, weight, count_agreed, chunk_terms
        )
        value = F.smooth_l1_loss(
            out.float(), states[label].float(), reduction="none"
        ).mean(-1)
        plosses.append(ce / normaliser)
        vlosses.append(torch.sum(weight * value) / normaliser)
        agreements.append(agreed)
    ploss, vloss = torch.stack(plosses), torch.stack(vlosses)
    decay = weights.decay ** torch.arange(len(plosses), device=ploss.device)
    loss = (decay * (weights.value * vloss + weights.prob * ploss)).sum()
    return DraftLoss(
        loss,
        ploss.detach(),
        vloss.detach(),
        rows.weight.sum(dim=1),
        torch.stack(agreements) if count_agreed else None,
    )


def _soft_labels(
    states: torch.Tensor,  # [S, H]
    lm_head: torch.Tensor,  # [V, H]
    compiled: bool,
) -> torch.Tensor:  # [S, V] in lm_head's dtype
    probabilities = _compiled(_probabilities) if compiled else _probabilities
    labels = states.new_empty((states.shape[0], lm_head.shape[0]), dtype=lm_head.dtype)
    chunk = max(1, _CHUNK_LOGITS // lm_head.shape[0])
    for start in range(0, states.shape[0], chunk):
        part = slice(start, start + chunk)
        labels[part] = probabilities(states[part].to(lm_head.dtype) @ lm_head.T)
    return labels


def label_agreement(
    post_norm: torch.Tensor,  # [B, T, H] target states after the final norm
    input_ids: torch.Tensor,  # [B, T] int64, u_t = x_{t+1}
    lm_head: torch.Tensor,  # [V, H] the whole vocabulary
    top_k: int = 8,
    top_p: float = 0.8,
) -> torch.Tensor:  # [B, T] bool
    """Whether the text's next token is one the target itself might have chosen.

    True where u_t ranks below `top_k` and the probability ranked strictly
    before it is at most `top_p`.  Keeps the draft from learning continuations
    that the target would never produce.
    """
    probs = torch.softmax(post_norm.to(lm_head.dtype) @ lm_head.T, dim=-1)
    values, tokens = probs.topk(top_k, dim=-1)
    before = values.cumsum(dim=-1) - values
    hit = (tokens == input_ids[..., None]) & (before <= top_p)
    return hit.any(dim=-1)
