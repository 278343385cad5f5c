# SPDX-License-Identifier: Apache-2.0
"""Llama layers of a draft, for training and offline evaluation.

Rows are a batch of sequences, with or without a KV cache, or texts packed one behind
the other (`Packing`), which needs no padding.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from vllm_clover2.model.layers import RMSNorm

__all__ = ["DraftCache", "LlamaLayer", "LlamaShape", "Packing", "Positions"]


class LlamaShape(Protocol):
    """What a layer reads of a configuration."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class Packing:
    """Texts that lie one behind the other in one row of tokens."""

    lengths: tuple[int, ...]  # of the texts, in order
    xformers: bool = False  # one CUDA kernel for all texts instead of one call each

    def positions(self, device: torch.device) -> torch.Tensor:
        """[tokens] int64: every text starts at 0."""
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])

    def attend(
        self,
        query: torch.Tensor,  # [1, heads, tokens, D]
        key: torch.Tensor,  # [1, KV, tokens, D]
        value: torch.Tensor,  # [1, KV, tokens, D]
    ) -> torch.Tensor:  # [1, heads, tokens, D]
        """Causal attention within each text."""
        if self.xformers:
            return _xformers_attention(query, key, value, self.lengths)
        parts = zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)))
        return torch.cat([_causal_attention(*part) for part in parts], dim=2)


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )


def _xformers_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    # Its layout is [1, tokens, heads, D], with as many key heads as query heads.
    groups = query.shape[1] // key.shape[1]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    key, value = (x.repeat_interleave(groups, dim=2) for x in (key, value))
    bias = BlockDiagonalCausalMask.from_seqlens(list(lengths))
    return memory_efficient_attention(query, key, value, bias).transpose(1, 2)


@dataclass
class DraftCache:
    """Keys (rotated) and values of the layers, [B, KV, S, D] each.

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
class Positions:
    """What every layer's attention needs to know about the rows."""

    cos: torch.Tensor  # [..., T, D] float32
    sin: torch.Tensor  # [..., T, D] float32
    mask: torch.Tensor | None = None  # [B, 1, T, S + T] bool, None = plain causal
    packing: Packing | None = None

    @classmethod
    def of(
        cls,
        positions: torch.Tensor,  # [..., T] int64
        shape: LlamaShape,
        mask: torch.Tensor | None = None,
        packing: Packing | None = None,
    ) -> "Positions":
        half = torch.arange(0, shape.head_dim, 2, device=positions.device).float()
        inverse = shape.rope_theta ** (-half / shape.head_dim)
        angle = positions.float()[..., None] * inverse
        angles = torch.cat([angle, angle], dim=-1)
        return cls(angles.cos(), angles.sin(), mask, packing)

    def rotate(
        self,
        x: torch.Tensor,  # [B, heads, T, D]
    ) -> torch.Tensor:
        """Rotary position embedding, halves rotated against each other."""
        first, second = x.float().chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (x.float() * self.cos + turned * self.sin).to(x.dtype)


class _Attention(nn.Module):
    """Causal grouped-query attention with rotary positions, no biases."""

    def __init__(self, shape: LlamaShape, layer: int) -> None:
        super().__init__()
        query_size = shape.num_attention_heads * shape.head_dim
        kv_size = shape.num_key_value_heads * shape.head_dim
        hidden = shape.hidden_size
        self.q_proj = nn.Linear(hidden, query_size, bias=False)
        self.k_proj = nn.Linear(hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, hidden, bias=False)
        self.head_dim = shape.head_dim
        self.layer = layer

    def _split(self, x: torch.Tensor) -> torch.Tensor:  # -> [B, heads, T, D]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, H]
        positions: Positions,
        cache: DraftCache | None,
    ) -> torch.Tensor:  # [B, T, H]
        query = positions.rotate(self._split(self.q_proj(x)))
        key = positions.rotate(self._split(self.k_proj(x)))
        value = self._split(self.v_proj(x))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        if positions.packing is not None:
            out = positions.packing.attend(query, key, value)
        elif positions.mask is not None:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=positions.mask, enable_gqa=True
            )
        else:
            out = _causal_attention(query, key, value)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    """One layer; with `input_norm` False its attention reads the input as it is."""

    def __init__(
        self, shape: LlamaShape, layer: int = 0, input_norm: bool = True
    ) -> None:
        super().__init__()
        norm = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = RMSNorm(*norm) if input_norm else nn.Identity()
        self.self_attn = _Attention(shape, layer)
        self.post_attention_layernorm = RMSNorm(*norm)
        self.mlp = _Mlp(shape)

    def forward(
        self,
        x: torch.Tensor,  # [B, T, H]
        positions: Positions,
        cache: DraftCache | None = None,
    ) -> torch.Tensor:  # [B, T, H]
        x = x + self.self_attn(self.input_layernorm(x), positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
