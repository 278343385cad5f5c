# SPDX-License-Identifier: Apache-2.0
"""Packed texts against the same texts one by one."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vllm_clover2.model import Clover2Config, Clover2Model, Packing


@torch.inference_mode()
def test_packed_texts_are_each_a_text_of_their_own() -> None:
    torch.manual_seed(0)
    model = Clover2Model(
        Clover2Config(
            vocab_size=20,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    lengths = (5, 1, 9)
    hidden, embeddings = torch.randn(2, 1, sum(lengths), 32)
    packed = model.augment(hidden, embeddings, packing=Packing(lengths))
    alone = [
        model.augment(*texts)
        for texts in zip(hidden.split(lengths, 1), embeddings.split(lengths, 1))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


def test_xformers_gets_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel needs a GPU: a stand-in checks what it is given."""

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        assert query.shape == key.shape == value.shape == (1, 15, 4, 8)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2)

    class Mask:
        @staticmethod
        def from_seqlens(lengths: list[int]) -> Tensor:
            blocks = [torch.ones(n, n).tril().bool() for n in lengths]
            return torch.block_diag(*blocks).bool()

    names = ("xformers", "xformers.ops", "xformers.ops.fmha")
    for name in (*names, "xformers.ops.fmha.attn_bias"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["xformers.ops"].memory_efficient_attention = attention
    sys.modules["xformers.ops.fmha.attn_bias"].BlockDiagonalCausalMask = Mask
    query, (key, value) = torch.randn(1, 4, 15, 8), torch.randn(2, 1, 2, 15, 8)
    plain, fused = (
        Packing((5, 1, 9), xformers=chosen).attend(query, key, value)
        for chosen in (False, True)
    )
    torch.testing.assert_close(fused, plain)
