# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1 in plain PyTorch, to compare Clover-2 with.

It computes what stock vLLM serves as method "eagle" with a Llama draft
(`llama_eagle.py` there), and its folders are served by stock vLLM as they are.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from vllm_clover2.model.llama import DraftCache, LlamaLayer, Packing, Positions
from vllm_clover2.model.weights import read_model, write_model

__all__ = ["Eagle1Config", "Eagle1Model", "load_eagle1", "save_eagle1"]


class Eagle1Config(LlamaConfig):
    """A Llama of one layer, as vLLM expects of an EAGLE head, and where it came from.

    The head owns neither embeddings nor an lm_head: vLLM takes the target's where a
    checkpoint has none. The reduced vocabulary is kept here and not as a tensor, and
    not as `draft_vocab_size`, because vLLM refuses tensors that it does not know and
    reads that name itself; stock vLLM scores the whole vocabulary.
    """

    num_hidden_layers: int = 1
    draft_vocab_ids: list[int] | None = None  # ascending, None = the whole vocabulary
    training: dict[str, Any] | None = None  # provenance
    target: dict[str, Any] | None = None  # fingerprint of the target model

    def __post_init__(self, **kwargs: Any) -> None:
        self.architectures = ["LlamaForCausalLM"]
        super().__post_init__(**kwargs)
        if self.num_hidden_layers != 1:
            raise ValueError(
                "an EAGLE-1 head has num_hidden_layers 1, found "
                f"{self.num_hidden_layers}; is this the folder of a whole model?"
            )
        if self.attention_bias or self.mlp_bias:
            raise ValueError("EAGLE-1 heads with attention_bias or mlp_bias: not made")

    @property
    def draft_vocab_size(self) -> int | None:
        return None if self.draft_vocab_ids is None else len(self.draft_vocab_ids)

    @property
    def rope_theta(self) -> float:
        """The base of the rotary positions, which must not be scaled."""
        parameters = self.rope_parameters or {}
        if parameters.get("rope_type", "default") != "default":
            raise ValueError(f"scaled rotary positions are not made, got {parameters}")
        # Read by LlamaConfig itself before the parameters are complete.
        return float(parameters.get("rope_theta", self.default_theta))


class Eagle1Model(nn.Module):
    """One Llama layer, without an input norm, over features and the next tokens.

    Position t pairs the target's post-norm state h_t with the embedding of the *next*
    token x_{t+1}; the output is the feature that stands for h_{t+1}, so the target's
    lm_head makes of it the logits for x_{t+2}. Embeddings are the target's input
    embeddings and are given by the caller.
    """

    draft_vocab_ids: torch.Tensor | None  # [draft_vocab_size] int64, ascending

    def __init__(self, config: Eagle1Config) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([LlamaLayer(config, 0, input_norm=False)])
        ids = config.draft_vocab_ids
        self.register_buffer(
            "draft_vocab_ids",
            None if ids is None else torch.tensor(ids, dtype=torch.int64),
            persistent=False,
        )

    def forward(
        self,
        features: torch.Tensor,  # [B, T, H] post-norm states, or earlier outputs
        embeddings: torch.Tensor,  # [B, T, H] of the next tokens
        positions: Positions,
        cache: DraftCache | None = None,
    ) -> torch.Tensor:  # [B, T, H] the next features
        x = self.fc(torch.cat([embeddings, features], dim=-1))
        return self.layers[0](x, positions, cache)

    def forward_packed(
        self,
        features: torch.Tensor,  # [N, H] post-norm states
        embeddings: torch.Tensor,  # [N, H] of the next tokens
        packing: Packing,
        cache: DraftCache | None = None,  # filled with all N keys and values
    ) -> torch.Tensor:  # [N, H] the next features
        """Whole texts, packed one behind the other."""
        rows = packing.positions(features.device)
        positions = Positions.of(rows, self.config, packing=packing)
        return self(features[None], embeddings[None], positions, cache)[0]


def save_eagle1(model: Eagle1Model, folder: Path, dtype: torch.dtype) -> None:
    """Write a head that stock vLLM serves; see `write_model`."""
    write_model(model, folder, dtype)


def load_eagle1(folder: Path, dtype: torch.dtype = torch.float32) -> Eagle1Model:
    """Read a head that `save_eagle1` wrote; every tensor must be there and fit."""
    return read_model(folder, Eagle1Config, Eagle1Model).to(dtype)
