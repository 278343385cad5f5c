# SPDX-License-Identifier: Apache-2.0
"""Targets that are found unsuitable only when they are loaded."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_clover2 import ops
from vllm_clover2.integration.attention import kv_layout, understands_trees
from vllm_clover2.integration.attention_cpu import TreeCPUAttentionBackend
from vllm_clover2.integration.draft_model import Clover2DraftModel


@pytest.mark.parametrize("lm_head", [None, nn.Linear(4, 8)], ids=["none", "linear"])
def test_target_without_an_lm_head_to_share(lm_head: nn.Module | None) -> None:
    target = SimpleNamespace(lm_head=lm_head)
    with pytest.raises(ValueError, match="shares the target's lm_head"):
        Clover2DraftModel.bind_target(SimpleNamespace(), target)


def test_target_with_a_quantized_lm_head() -> None:
    lm_head = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    nn.Module.__init__(lm_head)
    lm_head.quant_method = UnquantizedLinearMethod()  # has no look-up of rows either
    target = SimpleNamespace(lm_head=lm_head)
    with pytest.raises(ValueError, match="must not be quantised.*LinearMethod"):
        Clover2DraftModel.bind_target(SimpleNamespace(), target)


def test_backend_that_does_not_know_trees() -> None:
    assert understands_trees(TreeCPUAttentionBackend)
    assert not understands_trees(CPUAttentionBackend)


def test_cpu_layout_that_is_unknown() -> None:
    layer = SimpleNamespace(isa="neon", kv_cache=torch.zeros(1))
    with pytest.raises(NotImplementedError, match="this processor uses 'neon'"):
        kv_layout(layer)


@pytest.mark.parametrize(
    ("isa", "layout"),
    [
        ("vec", ops.KVLayout.VEC),
        ("vec16", ops.KVLayout.VEC),
        ("amx", ops.KVLayout.AMX),
        (None, ops.KVLayout.STRIDED),
    ],
)
def test_layouts(isa: str | None, layout: ops.KVLayout) -> None:
    assert kv_layout(SimpleNamespace(isa=isa)) == layout
