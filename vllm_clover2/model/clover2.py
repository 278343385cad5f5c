# SPDX-License-Identifier: Apache-2.0
"""Clover-2 in plain PyTorch: the model that is trained and evaluated offline.

The vLLM draft model computes the same thing on vLLM's layers; golden tests
hold both to the same tensors.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from vllm_clover2.model.config import Clover2Config
from vllm_clover2.model.layers import (
    RecurrentHead,
    RegressiveAttentionBlock,
    RMSNorm,
)

__all__ = ["Clover2Model", "DraftCache"]


@dataclass
class DraftCache:
    """Keys (rotated) and values of the augmenting layers, [B, KV, S, D] each.

    Only committed positions ever enter it, so nothing is rolled back.
    """

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0

    def extend(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]


@dataclass(frozen=True)
class _Positions:
    """What every layer's attention needs to know about the rows."""

    cos: torch.Tensor  # [T, D] float32
    sin: torch.Tensor  # [T, D] float32
    mask: torch.Tensor | None  # [B, 1, T, S + T] bool, None = plain causal


def _rotate(
    x: torch.Tensor,  # [B, heads, T, D]
    positions: _Positions,
) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * positions.cos + turned * positions.sin).to(x.dtype)


class _Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, no biases."""

    def __init__(self, config: Clover2Config, layer: int) -> None:
        super().__init__()
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, query_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, hidden, bias=False)
        self.head_dim = config.head_dim
        self.layer = layer

    def _split(self, x: torch.Tensor) -> torch.Tensor:  # -> [B, heads, T, D]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, H]
        positions: _Positions,
        cache: DraftCache | None,
    ) -> torch.Tensor:  # [B, T, H]
        query = _rotate(self._split(self.q_proj(x)), positions)
        key = _rotate(self._split(self.k_proj(x)), positions)
        value = self._split(self.v_proj(x))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=positions.mask,
            is_causal=positions.mask is None,
            enable_gqa=True,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _AugmentingLayer(nn.Module):
    """A Llama layer, with both of its norms."""

    def __init__(self, config: Clover2Config, layer: int) -> None:
        super().__init__()
        norm = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm)
        self.self_attn = _Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = _Mlp(config)

    def forward(
        self, x: torch.Tensor, positions: _Positions, cache: DraftCache | None
    ) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Clover2Model(nn.Module):
    """The whole draft: augmenting block over the sequence, then the recurrence.

    Position t pairs the target's pre-norm hidden state h_t with the embedding
    of the *next* token x_{t+1}; step i's output predicts token x_{t+2+i}.
    Embeddings are rows of the target's lm_head and are given by the caller.
    """

    draft_vocab_ids: torch.Tensor | None  # [draft_vocab_size] int64, ascending

    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        self.config = config
        row = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        self.rab1 = RegressiveAttentionBlock(*row)
        self.layers = nn.ModuleList(
            _AugmentingLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recurrent = RecurrentHead(*row)
        ids = None
        if config.draft_vocab_size is not None:
            ids = torch.arange(config.draft_vocab_size, dtype=torch.int64)
        self.register_buffer("draft_vocab_ids", ids)

    def augment(
        self,
        hidden: torch.Tensor,  # [B, T, H] the target's pre-norm hidden states
        embeddings: torch.Tensor,  # [B, T, H] of the next tokens
        attention_mask: torch.Tensor | None = None,  # [B, S + T], 0 = padding
        cache: DraftCache | None = None,
    ) -> torch.Tensor:  # [B, T, H] initial recurrent states g^0
        """Run the augmenting block over T new positions, after S cached ones.

        Right padding needs no `attention_mask`: causality keeps it away from
        the valid rows.
        """
        positions = self._positions(hidden, attention_mask, cache)
        x = self.rab1(hidden, embeddings)
        for layer in self.layers:
            x = layer(x, positions, cache)
        return self.norm(x)

    def _positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: DraftCache | None,
    ) -> _Positions:
        past = cache.length if cache is not None else 0
        length, device = hidden.shape[1], hidden.device
        rows = torch.arange(past, past + length, device=device)
        half = torch.arange(0, self.config.head_dim, 2, device=device).float()
        inverse = self.config.rope_theta ** (-half / self.config.head_dim)
        angles = torch.outer(rows.float(), inverse).repeat(1, 2)
        mask = None
        if past or attention_mask is not None:
            columns = torch.arange(past + length, device=device)
            mask = (columns <= rows[:, None])[None, None]
            if attention_mask is not None:
                mask = mask & attention_mask[:, None, None, :].bool()
                # A padded row may see nothing at all; let it see itself, so
                # that it stays finite.  No valid row ever looks at it.
                mask = mask | (columns == rows[:, None])
        return _Positions(angles.cos(), angles.sin(), mask)

    def unroll(
        self,
        g: torch.Tensor,  # [B, T, H]
        embeddings: torch.Tensor,  # [B, T, H] of the next tokens
        num_steps: int,
    ) -> torch.Tensor:  # [num_steps, B, T, H]
        """Teacher-forced recurrence over whole sequences.

        Step i consumes the embedding at t + i; rows without one are zero.
        """
        outputs = [self.recurrent.first(g)]
        for step in range(1, num_steps):
            g, out = self.recurrent.advance(
                g[:, : g.shape[1] - 1], embeddings[:, step:]
            )
            outputs.append(F.pad(out, (0, 0, 0, step)))
        return torch.stack(outputs)
