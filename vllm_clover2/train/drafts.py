# SPDX-License-Identifier: Apache-2.0
"""New drafts for a target: configuration, starting weights, training forward."""

import torch
from torch import nn

from vllm_clover2.model import Clover2Config, Clover2Model
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.losses import LossRows

__all__ = ["TrainableClover2", "new_clover2", "target_fingerprint"]

# Width of the uniform noise on identities, as in the original; there it is
# one-sided, here it is centred.
_NOISE = 0.01


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
    _start_recurrence(model)
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


@torch.no_grad()
def _start_recurrence(model: Clover2Model) -> None:
    """Identity plus a little noise: at the start every block passes its input."""
    recurrent = model.recurrent
    for linear, scale in (
        (model.rab1.q_proj, 1.0),
        (model.rab1.k_proj, 1.0),
        (model.rab1.v_proj, 0.0),
        (recurrent.rab2.q_proj, 1.0),
        (recurrent.rab2.k_proj, 1.0),
        (recurrent.rab2.v_proj, 0.0),
        (recurrent.first, 1.0),
        (recurrent.step, 1.0),  # [I | 0]: state first, embedding second
    ):
        nn.init.eye_(linear.weight).mul_(scale)
        noise = torch.empty_like(linear.weight).uniform_(-_NOISE / 2, _NOISE / 2)
        linear.weight.add_(noise)
        nn.init.zeros_(linear.bias)


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
