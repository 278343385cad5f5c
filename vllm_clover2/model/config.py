# SPDX-License-Identifier: Apache-2.0
"""Configuration of a Clover-2 draft head."""

import math
from typing import Any

from transformers import AutoConfig, PretrainedConfig

__all__ = ["Clover2Config", "REFERENCE_ROPE_THETA"]

# The original implementation never reads its config's rope_theta: every
# checkpoint trained with it was trained with this base.
REFERENCE_ROPE_THETA = 10000.0

# Sizes from 1 up to these are believed. None is a limit of the method: what lies above
# is a damaged or mistyped file, and building a model of it would take all memory.
_LARGEST = {
    "vocab_size": 2**21,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 64,
    "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10,
    "head_dim": 2**10,
    "max_position_embeddings": 2**24,
    "num_draft_steps": 63,
}


class Clover2Config(PretrainedConfig):
    """Shape of a Clover-2 head, and where it came from.

    The head owns neither embeddings nor an lm_head: both are rows of the
    target's lm_head, so `hidden_size` and `vocab_size` must equal the target's.
    """

    model_type = "clover2"

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 2  # layers of the augmenting block
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None = num_attention_heads
    head_dim: int | None = None  # None = hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-5  # also clamps the norms in the cosine attention
    rope_theta: float = REFERENCE_ROPE_THETA
    max_position_embeddings: int = 2048
    num_draft_steps: int = 5  # depth the head was trained for
    draft_vocab_size: int | None = None  # None = the whole vocabulary is scored
    # States after so many of the target's layers are read too; ascending. None, as in
    # the original: the last layer's alone.
    aux_hidden_state_layers: list[int] | None = None
    tie_word_embeddings: bool = False
    training: dict[str, Any] | None = None  # provenance
    target: dict[str, Any] | None = None  # fingerprint of the target model

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_values()
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self.architectures = ["Clover2DraftModel"]
        super().__post_init__(**kwargs)
        self._check_fit()

    def _check_values(self) -> None:
        """Each value by itself: its type and its range."""
        for name, largest in _LARGEST.items():
            size = getattr(self, name)
            if size is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if not _is_size(size, largest):
                raise ValueError(
                    f"{name} must be an integer in 1..{largest}, got {size!r}"
                )
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        layers = self.aux_hidden_state_layers
        if layers is not None and not (
            isinstance(layers, list)
            and layers
            and all(_is_size(layer, 2**10) for layer in layers)
            and layers == sorted(set(layers))
        ):
            raise ValueError(
                "aux_hidden_state_layers must be null or ascending numbers of layers, "
                f"from 1 up, got {layers!r}"
            )
        for name in ("training", "target"):
            if not isinstance(getattr(self, name), dict | None):
                raise ValueError(
                    f"{name} must be an object or null, got {getattr(self, name)!r}"
                )

    def _check_fit(self) -> None:
        """The sizes among each other."""
        if self.hidden_size % self.num_attention_heads:
            # The cosine attention splits the hidden state itself into heads.
            raise ValueError(
                "hidden_size must be a multiple of num_attention_heads, got "
                f"{self.hidden_size} and {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, got "
                f"{self.num_attention_heads} and {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for RoPE, got {self.head_dim}")
        size = self.draft_vocab_size
        if size is not None and not _is_size(size, self.vocab_size):
            raise ValueError(
                f"draft_vocab_size must lie in 1..vocab_size ({self.vocab_size}) or "
                f"be null, got {size!r}"
            )


def _is_size(value: Any, largest: int) -> bool:
    return type(value) is int and 1 <= value <= largest


AutoConfig.register("clover2", Clover2Config, exist_ok=True)
