# SPDX-License-Identifier: Apache-2.0
"""Targets whose trees could not be verified are refused before the first step."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import EnginePool
from torch import nn
from transformers import BloomConfig, BloomForCausalLM
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_clover2 import ops
from vllm_clover2.integration import layer_limits
from vllm_clover2.integration.attention_cpu import (
    TreeCPUAttentionBackend,
    TreeCPUAttentionImpl,
)

REPO = Path(__file__).parents[2]


def attention_layer(**changes: Any) -> Attention:
    """A layer like those of a Llama; ``changes`` are set on it, or on its ``impl``."""
    layer = Attention.__new__(Attention)
    nn.Module.__init__(layer)
    layer.impl = TreeCPUAttentionImpl.__new__(TreeCPUAttentionImpl)
    on_impl = {"attn_type": "decoder", "sinks": None, "alibi_slopes": None}
    on_layer = {
        "layer_name": "model.layers.0.self_attn.attn",
        "attn_backend": TreeCPUAttentionBackend,
        "use_mm_prefix": False,
        "sliding_window": None,
        "kv_sharing_target_layer_name": None,
        "kv_cache_torch_dtype": torch.bfloat16,
        "dtype": torch.bfloat16,
        "head_size": 64,
        "head_size_v": 64,
    }
    for name, value in (on_layer | on_impl | changes).items():
        owner = layer.impl if name in on_impl or name == "chunk_lookback" else layer
        object.__setattr__(owner, name, value)
    return layer


def test_a_usual_layer_is_accepted() -> None:
    layer_limits.refuse_unsuitable_layers([attention_layer()], "cpu")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attn_backend": CPUAttentionBackend}, "the attention backend CPU_ATTN: "),
        ({"attn_type": "encoder_only"}, "attention of type encoder_only"),
        ({"use_mm_prefix": True}, "attention to both sides of a prefix"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"chunk_lookback": 1}, "chunked attention"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "KV shared between layers"),
        (
            {"kv_cache_torch_dtype": torch.float8_e4m3fn},
            "torch.float8_e4m3fn KV beside torch.bfloat16 queries",
        ),
        ({"head_size_v": 32}, "values of size 32 beside keys of size 64"),
        (
            {"head_size": 72, "head_size_v": 72},
            "head size 72 (known are multiples of 16)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_tree_attention_cannot_compute(
    changes: dict[str, Any], reason: str
) -> None:
    layers = [attention_layer(), attention_layer(**changes, layer_name="layers.1")]
    with pytest.raises(ValueError, match=re.escape(f"- trees with {reason}")) as error:
        layer_limits.refuse_unsuitable_layers(layers, "cpu")
    assert '"tree": "chain"' in str(error.value)
    assert "(1 layers, the first is layers.1)" in str(error.value)


def test_sliding_windows_are_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backend", lambda _: "native")
    layers = [attention_layer(), attention_layer(sliding_window=64)]
    layer_limits.refuse_unsuitable_layers(layers, "cpu")
    with pytest.raises(ValueError, match="trees with a sliding window on CUDA: .*1 la"):
        layer_limits.refuse_unsuitable_layers(layers, "cuda")


def test_layers_of_another_class() -> None:
    class RSWAAttention(Attention):
        """An attention that masks more than the future."""

    layer = attention_layer()
    layer.__class__ = RSWAAttention
    with pytest.raises(ValueError, match="trees with layers of type RSWAAttention"):
        layer_limits.refuse_unsuitable_layers([layer], "cpu")


@pytest.mark.parametrize("size", [32, 48, 112, 160, 192, 512])
def test_head_sizes_without_a_cuda_kernel(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "backend", lambda _: "native")
    layer = attention_layer(head_size=size, head_size_v=size)
    with pytest.raises(ValueError, match=f"head size {size} \\(known are 64, 80, 96"):
        layer_limits.refuse_unsuitable_layers([layer], "cuda")
    layer_limits.refuse_unsuitable_layers([layer], "cpu")


@pytest.mark.parametrize("size", layer_limits.CUDA_HEAD_SIZES)
def test_head_sizes_with_a_cuda_kernel(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "backend", lambda _: "native")
    layer = attention_layer(head_size=size, head_size_v=size)
    layer_limits.refuse_unsuitable_layers([layer], "cuda")


def test_head_sizes_are_those_of_the_cuda_sources() -> None:
    source = (REPO / "kernels/cuda/launch.h").read_text()
    (sizes,) = re.findall(r"kHeadDims\[\] = \{(.*)\};", source)
    assert tuple(map(int, sizes.split(","))) == layer_limits.CUDA_HEAD_SIZES


def test_cuda_without_compiled_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """As built where there was no nvcc."""
    monkeypatch.delenv("CLOVER2_OPS", raising=False)
    monkeypatch.setattr(ops, "backend", lambda _: "reference")
    message = "without the compiled CUDA ops.*install nvcc.*--force-reinstall"
    with pytest.raises(ValueError, match=message):
        layer_limits.refuse_unsuitable_layers([attention_layer()], "cuda")
    layer_limits.refuse_unsuitable_layers([attention_layer()], "cpu")
    monkeypatch.setenv("CLOVER2_OPS", "reference")
    layer_limits.refuse_unsuitable_layers([attention_layer()], "cuda")


def kv_groups(**groups: list[str]) -> Any:
    """Groups of KV by the names of their kinds, with the names of their layers."""
    return SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(kv_cache_spec=type(kind, (), {})(), layer_names=names)
            for kind, names in groups.items()
        ]
    )


def test_several_groups_of_kv_on_model_runner_v2() -> None:
    layer_limits.refuse_several_kv_groups(kv_groups(FullAttentionSpec=["a", "b"]))
    with pytest.raises(
        ValueError, match=r"2 groups of KV cache \(FullAttentionSpec, S.*Runner V2"
    ):
        layer_limits.refuse_several_kv_groups(
            kv_groups(FullAttentionSpec=["a"], SlidingWindowSpec=["b"])
        )


def test_head_in_several_groups_of_kv() -> None:
    groups = kv_groups(SlidingWindowSpec=["a"], FullAttentionSpec=["b"], Other=["c"])
    layer_limits.refuse_scattered_head(groups, {"b"})
    layer_limits.refuse_scattered_head(groups, frozenset())
    with pytest.raises(ValueError, match="2 layers are in 2 groups.*disable_hybrid"):
        layer_limits.refuse_scattered_head(groups, {"b", "c"})


def test_layers_are_looked_at_when_a_model_is_loaded(
    engines: EnginePool, target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_limits, "_head_sizes", lambda *_: ("64 only", False))
    options = {"kv_cache_memory_bytes": 8 << 20}
    message = (
        r"head size 32 \(known are 64 only\).*\(4 layers, .* is model\.layers\.0\."
    )
    with pytest.raises(ValueError, match=message):
        engines.get(target, head, **options)
    engines.get(target, head, {"tree": "chain"}, **options)


def test_loading_a_model_without_intermediate_hidden_states(
    engines: EnginePool, head: Path, tmp_path: Path
) -> None:
    """vLLM's own refusal: its EAGLE-3 interface hands out the last layer's output."""
    sizes = {"vocab_size": 512, "hidden_size": 128, "n_layer": 1, "n_head": 4}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="does not support EAGLE3 interface"):
        engines.get(tmp_path, head, skip_tokenizer_init=True)
