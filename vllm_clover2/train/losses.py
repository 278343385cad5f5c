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

Beyond the original, `OnPolicy` counts a step only where the draft's own choices led to
it, and later steps can be computed at a sample of the rows.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "DraftLoss",
    "LossRows",
    "LossWeights",
    "OnPolicy",
    "draft_loss",
    "label_agreement",
]

# Rows of logits held at once: 512 x 8,192 floats stay in a CPU's last-level cache.
_CHUNK_LOGITS = 512 * 8192


@dataclass(frozen=True)
class LossWeights:
    value: float = 10.0
    prob: float = 1.0
    decay: float = 0.7


def _shift_steps(
    flags: torch.Tensor,  # [N] bool
    text: torch.Tensor,  # [N] int64, number of the text that each position is in
    num_steps: int,
) -> torch.Tensor:  # [D, N] bool: step i holds flags[t + i] within the text
    length = len(flags)
    shifted = []
    for step in range(num_steps):
        missing = min(step, length)
        same_text = F.pad(text[step:], (0, missing), value=-1) == text
        shifted.append(F.pad(flags[step:], (0, missing)) & same_text)
    return torch.stack(shifted)


@dataclass(frozen=True)
class LossRows:
    """The positions of a packed batch where at least one step has a loss.

    Steps after the first are computed at the first `num_later` of them only.
    """

    position: torch.Tensor  # [R] int64, t
    weight: torch.Tensor  # [D, R] float32, w of step i
    label: torch.Tensor  # [D, R] int64, number of t + i in `label_position`, or 0
    label_position: torch.Tensor  # [S] int64, the positions with M = 1
    num_later: int

    @classmethod
    def build(
        cls,
        loss_mask: torch.Tensor,  # [N] bool, M; 0 at each text's last position
        lengths: tuple[int, ...],  # of the packed texts
        num_steps: int,
        agreement: torch.Tensor | None = None,  # [N] bool, c of `label_agreement`
        later_share: float = 1.0,  # of the rows, drawn at random, in later steps
    ) -> "LossRows":
        mask, device = loss_mask.bool(), loss_mask.device
        text = torch.repeat_interleave(torch.tensor(lengths)).to(device)
        shifted = _shift_steps(mask, text, num_steps)
        weight = shifted.float()
        if agreement is not None:
            along = _shift_steps(agreement.bool(), text, num_steps)
            weight = weight * along.cumprod(dim=0)
        position = shifted.any(dim=0).nonzero()[:, 0]
        if later_share < 1:
            position = position[torch.randperm(len(position)).to(device)]
        label_position = mask.nonzero()[:, 0]
        number = torch.zeros_like(text)
        number[label_position] = torch.arange(len(label_position), device=device)
        steps = torch.arange(num_steps, device=device)[:, None]
        reached = (position + steps).clamp(max=len(mask) - 1)
        return cls(
            position,
            weight[:, position],
            number[reached],
            label_position,
            num_later=math.ceil(later_share * len(position)),
        )


@dataclass(frozen=True)
class DraftLoss:
    loss: torch.Tensor  # scalar
    ploss: torch.Tensor  # [D]
    vloss: torch.Tensor  # [D]
    weight: torch.Tensor  # [D] sum of w
    agreed: torch.Tensor | None  # [D] sum of w where both argmaxes are the same


@dataclass(frozen=True)
class OnPolicy:
    """Later steps are trained on the draft's own tokens, where the text has them too.

    Serving reaches a step only along nodes that the draft itself proposed. What the
    target would say after a proposal that the text does not have is unknown, and never
    matters: such a node is rejected. So w of step i > 0 is set to 0 unless the draft's
    `top_k` likeliest tokens held the text's token at every earlier step.
    """

    text: torch.Tensor  # [S] int64, the text's token after each label, -1: not drafted
    top_k: int


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


def _held(
    logits: torch.Tensor,  # [C, V]
    text: torch.Tensor,  # [C] int64 columns, -1: none
    top_k: int,
) -> torch.Tensor:  # [C] bool
    """Whether the text's token is among the `top_k` likeliest; ties count for it."""
    wanted = logits.gather(1, text.clamp(min=0)[:, None])
    return ((logits > wanted).sum(dim=1) < top_k) & (text >= 0)


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
        on_policy: OnPolicy | None,
        chunk_terms: _ChunkTerms,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradient = torch.empty_like(outputs)
        loss = outputs.new_zeros((), dtype=torch.float32)
        agreed = outputs.new_zeros((), dtype=torch.float32)
        held = torch.ones_like(weight, dtype=torch.bool)
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
            if on_policy is not None:
                text = on_policy.text[label[part]]
                held[part] = _held(logits, text, on_policy.top_k)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(agreed, held)
        return loss, agreed, held

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx,
        grad_loss: torch.Tensor,
        *_: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss, *[None] * 7


def draft_loss(
    outputs: Iterable[torch.Tensor],  # D steps' [R or num_later, H] at `rows`
    targets: torch.Tensor,  # [N, H] Y: post-norm target states, one ahead
    rows: LossRows,
    lm_head: torch.Tensor,  # [V or draft_vocab_size, H]
    weights: LossWeights,
    *,
    on_policy: OnPolicy | None = None,
    count_agreed: bool = False,
    compiled: bool = False,
) -> DraftLoss:
    """Both losses of every step, normalised over the batch."""
    chunk_terms = _compiled(_chunk_terms) if compiled else _chunk_terms
    states = targets[rows.label_position]  # [S, H]
    with torch.no_grad():
        labels = _soft_labels(states, lm_head, compiled)
    plosses, vlosses, agreements, totals = [], [], [], []
    reached = torch.ones_like(rows.weight[0])
    for step, out in enumerate(outputs):
        part = slice(len(out))
        weight, label = rows.weight[step, part] * reached[part], rows.label[step, part]
        normaliser = weight.sum() + 1.0
        ce, agreed, held = _SoftCrossEntropy.apply(
            out, lm_head, labels, label, weight, count_agreed, on_policy, chunk_terms
        )
        value = F.smooth_l1_loss(
            out.float(), states[label].float(), reduction="none"
        ).mean(-1)
        plosses.append(ce / normaliser)
        vlosses.append(torch.sum(weight * value) / normaliser)
        agreements.append(agreed)
        totals.append(weight.sum())
        reached = reached[part] * held
    ploss, vloss = torch.stack(plosses), torch.stack(vlosses)
    decay = weights.decay ** torch.arange(len(plosses), device=ploss.device)
    loss = (decay * (weights.value * vloss + weights.prob * ploss)).sum()
    return DraftLoss(
        loss,
        ploss.detach(),
        vloss.detach(),
        torch.stack(totals),
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
    post_norm: torch.Tensor,  # [N, H] target states after the final norm
    input_ids: torch.Tensor,  # [N] int64, u_t = x_{t+1}
    lm_head: torch.Tensor,  # [V, H] the whole vocabulary
    top_k: int = 8,
    top_p: float = 0.8,
) -> torch.Tensor:  # [N] bool
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
