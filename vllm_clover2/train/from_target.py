# SPDX-License-Identifier: Apache-2.0
"""What drafts of every architecture take from their target."""

from typing import Any, Literal

from torch import nn

from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.hidden import Target

__all__ = ["layer_shape", "rope_theta", "start_layers", "target_record"]

# Sizes of a Llama's layer, and what other families call them.
_NAMES = {
    "vocab_size": (),
    "hidden_size": (),
    "intermediate_size": ("n_inner", "ffn_hidden_size"),
    "num_attention_heads": (),
    "num_key_value_heads": ("num_attention_heads",),
    "rms_norm_eps": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "max_position_embeddings": (),
}


def layer_shape(target: Target) -> dict[str, Any]:
    """Settings of a draft whose layers are as large as the target's.

    Raises:
        ValueError: the target has no such size.
    """
    shape: dict[str, Any] = {"head_dim": getattr(target.config, "head_dim", None)}
    for name, others in _NAMES.items():
        found = (getattr(target.config, one, None) for one in (name, *others))
        shape[name] = next((value for value in found if value is not None), None)
        if shape[name] is None:
            raise ValueError(
                f"a target's config must have one of {[name, *others]}; "
                f"{target.config.model_type}'s has none, so no draft can be made for it"
            )
    return shape


def target_record(target: Target) -> dict[str, object]:
    """What identifies a target well enough to find the head made for it."""
    config = target.config
    return {
        "name": str(getattr(config, "_name_or_path", "")).rstrip("/").split("/")[-1],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "chat_template_sha256": target.chat_template,
    }


def rope_theta(config: TrainConfig, target: Target) -> float:
    """The base of the draft's rotary positions: the given one, or the target's."""
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


def start_layers(
    layers: nn.ModuleList, target: Target, which: Literal["last", "first", "random"]
) -> None:
    """Copy the target's last or first layers into the draft's.

    Raises:
        ValueError: it has too few of them, or their parts are not a Llama's.
    """
    if which == "random":
        return
    decoder = target.model.get_decoder()
    sources = getattr(decoder, "layers", [nn.Identity()] * len(layers))
    if len(layers) > len(sources):
        raise ValueError(
            f"num_layers ({len(layers)}) exceeds the target's {len(sources)}; use "
            "init_layers=random"
        )
    first = len(sources) - len(layers) if which == "last" else 0
    for layer, source in zip(layers, sources[first:]):
        theirs = source.state_dict()
        wanted = {name: theirs[name] for name in layer.state_dict() if name in theirs}
        try:
            layer.load_state_dict(wanted)
        except RuntimeError as error:
            raise ValueError(
                "the target's layers are not Llama-shaped, so the draft cannot start "
                f"from them; use init_layers=random ({error})"
            ) from error
