# SPDX-License-Identifier: Apache-2.0
"""New drafts for a target: configuration, starting weights, training forward."""

from typing import NamedTuple

import torch
from torch import nn

from vllm_clover2.model import (
    Clover2Config,
    Clover2Model,
    RegressiveAttentionBlock,
)
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.losses import LossRows

__all__ = [
    "Gains",
    "TrainableClover2",
    "make_optimizers",
    "measure_gains",
    "new_clover2",
    "target_fingerprint",
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
        hidden: torch.Tensor,  # [B, T, H] pre-norm states of the target
        embeddings: torch.Tensor,  # [B, T, H] of the next tokens
        rows: LossRows,
    ) -> torch.Tensor:  # [D, R, H] outputs of every step at `rows`
        """Teacher-forced: step i consumes the text's own token at t + i."""
        g = self.draft.augment(hidden, embeddings)[rows.batch, rows.position]
        outputs = [self.draft.recurrent.first(g)]
        last = hidden.shape[1] - 1
        for step in range(1, rows.weight.shape[0]):
            # Rows whose t + i lies beyond the end have weight 0.
            reached = (rows.position + step).clamp(max=last)
            g, out = self.draft.recurrent.advance(g, embeddings[rows.batch, reached])
            outputs.append(out)
        return torch.stack(outputs)


class Gains(NamedTuple):
    """Scales of the value projections: embeddings are far smaller than states."""

    rab1: float  # adds to pre-norm hidden states
    rab2: float  # adds to recurrent states, as large as post-norm hidden states


def target_fingerprint(target: Target) -> dict[str, object]:
    """What identifies a target well enough to find the head made for it."""
    config = target.config
    return {
        "name": str(getattr(config, "_name_or_path", "")).rstrip("/").split("/")[-1],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def new_clover2(
    config: TrainConfig,
    target: Target,
    draft_vocab_ids: torch.Tensor | None,  # [draft_vocab_size] int64, ascending
    gains: Gains | None,  # None: start as the original does
) -> Clover2Model:
    """A head with the target's layer shape, started from the target's weights."""
    shape = target.config
    model = Clover2Model(
        Clover2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None),
            rms_norm_eps=shape.rms_norm_eps,
            rope_theta=_rope_theta(config, target),
            max_position_embeddings=shape.max_position_embeddings,
            num_draft_steps=config.num_draft_steps,
            draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
            target=target_fingerprint(target),
        )
    )
    if draft_vocab_ids is not None:
        model.draft_vocab_ids.copy_(draft_vocab_ids)
    _start_recurrence(model, gains)
    _start_from_target(model, target, config)
    return model


def _rope_theta(config: TrainConfig, target: Target) -> float:
    if config.rope_theta is not None:
        return config.rope_theta
    parameters = getattr(target.config, "rope_parameters", None) or {}
    theta = parameters.get("rope_theta", getattr(target.config, "rope_theta", None))
    if theta is None or parameters.get("rope_type", "default") != "default":
        raise ValueError(
            f"cannot take rope_theta from the target (found {parameters}); set "
            "rope_theta explicitly"
        )
    return float(theta)


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


def make_optimizers(
    model: nn.Module, gains: Gains | None, config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the larger matrices and AdamW for the rest.

    The blocks' projections stay with AdamW: their useful scales differ by orders
    of magnitude, which Muon's equal-sized updates ignore.
    """
    muon: list[nn.Parameter] = []
    groups: dict[str, list[nn.Parameter]] = {"": [], "rab1": [], "rab2": []}
    for name, parameter in model.named_parameters():
        if gains is not None and name.endswith("rab1.v_proj.weight"):
            groups["rab1"].append(parameter)
        elif gains is not None and name.endswith("rab2.v_proj.weight"):
            groups["rab2"].append(parameter)
        elif config.muon_lr is not None and parameter.ndim == 2 and "rab" not in name:
            muon.append(parameter)
        else:
            groups[""].append(parameter)
    lr, decay = config.learning_rate, config.weight_decay
    scales = {"": 1.0}
    if gains is not None:
        # An Adam step changes every entry by about the learning rate, whatever its
        # size; a matrix started `gain` times larger needs a rate as much larger.
        scales |= {"rab1": gains.rab1, "rab2": gains.rab2}
    adamw = torch.optim.AdamW(
        [
            {"params": groups[key], "lr": lr * scale, "weight_decay": decay / scale}
            for key, scale in scales.items()
        ],
        betas=(0.9, config.beta2),
        fused=True,
    )
    if not muon:
        return [adamw]
    return [
        adamw,
        torch.optim.Muon(
            muon,
            lr=config.muon_lr,
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]


@torch.no_grad()
def measure_gains(
    target: Target,
    input_ids: torch.Tensor,  # [B, T] int64 of real text, no padding
) -> Gains:
    """Gains that bring output embeddings to `_TOKEN_SHARE` of the states' size."""

    def size(rows: torch.Tensor) -> float:
        # The median: SmolLM2's first token is two hundred times the others.
        return float(rows.float().square().mean(-1).sqrt().median())

    hidden = target.pre_norm(input_ids)
    embeddings = size(target.lm_head[input_ids])
    scale = _TOKEN_SHARE / embeddings
    return Gains(size(hidden) * scale, size(target.post_norm(hidden)) * scale)


@torch.no_grad()
def _start_from_target(
    model: Clover2Model, target: Target, config: TrainConfig
) -> None:
    decoder = target.model.get_decoder()
    for norm in (model.norm, model.recurrent.norm):
        norm.weight.copy_(decoder.norm.weight)
    if config.init_layers == "random":
        return
    if config.num_layers > len(decoder.layers):
        raise ValueError(
            f"num_layers ({config.num_layers}) exceeds the target's "
            f"{len(decoder.layers)}; use init_layers=random"
        )
    last = config.init_layers == "last"
    first = len(decoder.layers) - config.num_layers if last else 0
    for number, layer in enumerate(model.layers):
        source = decoder.layers[first + number].state_dict()
        wanted = {name: source[name] for name in layer.state_dict() if name in source}
        try:
            layer.load_state_dict(wanted)
        except RuntimeError as error:
            raise ValueError(
                "the target's layers are not Llama-shaped, so the draft cannot start "
                f"from them; use init_layers=random ({error})"
            ) from error
