# SPDX-License-Identifier: Apache-2.0
"""Clover-2 in plain PyTorch: the model that is trained and evaluated offline.

The vLLM draft model computes the same thing on vLLM's layers; golden tests
hold both to the same tensors.
"""

from collections.abc import Sequence

import torch
from torch import nn

from vllm_clover2.model.config import Clover2Config
from vllm_clover2.model.layers import (
    LayerFusion,
    RecurrentHead,
    RegressiveAttentionBlock,
    RMSNorm,
)
from vllm_clover2.model.llama import DraftCache, LlamaLayer, Packing, Positions

__all__ = ["Clover2Model"]


class Clover2Model(nn.Module):
    """The whole draft: augmenting block over the sequence, then the recurrence.

    Position t pairs the target's pre-norm hidden state h_t with the embedding
    of the *next* token x_{t+1}; step i's output predicts token x_{t+2+i}. To h_t
    states of inner layers can be added. Embeddings are rows of the target's lm_head
    and are given by the caller.
    """

    draft_vocab_ids: torch.Tensor | None  # [draft_vocab_size] int64, ascending

    def __init__(self, config: Clover2Config) -> None:
        super().__init__()
        self.config = config
        row = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        self.fusion: LayerFusion | None = None
        if config.aux_hidden_state_layers is not None:
            self.fuse_layers(config.aux_hidden_state_layers)
        self.rab1 = RegressiveAttentionBlock(*row)
        self.layers = nn.ModuleList(
            LlamaLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recurrent = RecurrentHead(*row)
        ids = None
        if config.draft_vocab_size is not None:
            ids = torch.arange(config.draft_vocab_size, dtype=torch.int64)
        self.register_buffer("draft_vocab_ids", ids)

    def fuse_layers(self, layers: list[int]) -> None:
        """Read states after so many of the target's layers too, with zero weights."""
        config = self.config
        config.aux_hidden_state_layers = layers
        self.fusion = LayerFusion(config.hidden_size, len(layers), config.rms_norm_eps)

    def fused(
        self,
        pre_norm: torch.Tensor,  # [..., H] the target's pre-norm hidden states
        aux: Sequence[torch.Tensor],  # L x [..., H], those of the config's layers
    ) -> torch.Tensor:  # [..., H]
        """What `augment` takes."""
        return pre_norm if self.fusion is None else self.fusion(pre_norm, aux)

    def augment(
        self,
        hidden: torch.Tensor,  # [B, T, H] the target's states, as `fused` gives them
        embeddings: torch.Tensor,  # [B, T, H] of the next tokens
        attention_mask: torch.Tensor | None = None,  # [B, S + T], 0 = padding
        cache: DraftCache | None = None,
        packing: Packing | None = None,
    ) -> torch.Tensor:  # [B, T, H] initial recurrent states g^0
        """Run the augmenting block over T new positions, after S cached ones.

        Right padding needs no `attention_mask`: causality keeps it away from
        the valid rows. Packed texts (B = 1) have neither mask nor cache.
        """
        positions = self._positions(hidden, attention_mask, cache, packing)
        x = self.rab1(hidden, embeddings)
        for layer in self.layers:
            x = layer(x, positions, cache)
        return self.norm(x)

    def _positions(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: DraftCache | None,
        packing: Packing | None,
    ) -> Positions:
        device = hidden.device
        if packing is not None:
            rows = packing.positions(device)
            return Positions.of(rows, self.config, packing=packing)
        past = cache.length if cache is not None else 0
        length = hidden.shape[1]
        rows = torch.arange(past, past + length, device=device)
        mask = None
        if past or attention_mask is not None:
            columns = torch.arange(past + length, device=device)
            mask = (columns <= rows[:, None])[None, None]
            if attention_mask is not None:
                mask = mask & attention_mask[:, None, None, :].bool()
                # A padded row may see nothing at all; let it see itself, so
                # that it stays finite.  No valid row ever looks at it.
                mask = mask | (columns == rows[:, None])
        return Positions.of(rows, self.config, mask)
