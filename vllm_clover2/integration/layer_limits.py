# SPDX-License-Identifier: Apache-2.0
"""Targets whose trees could not be verified, found when they have been loaded.

Allowed is what tree attention computes: causal attention of a layer over KV of its own,
in the model's dtype, by one of our backends, with or without a cap on the logits, and
on the CPU with or without a sliding window.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_clover2 import ops
from vllm_clover2.integration.attention import understands_trees
from vllm_clover2.integration.limits import refuse

CUDA_HEAD_SIZES = (64, 80, 96, 128, 256)
"""Those that ``kernels/cuda/launch.h`` has tree attention for."""

CHAIN = 'use "tree": "chain"'
ONE_GROUP = "set disable_hybrid_kv_cache_manager, which makes one group of them"


def refuse_unsuitable_layers(layers: Iterable[Any], device_type: str) -> None:
    """Raise unless trees can be verified by every attention layer of the target.

    Raises:
        ValueError: one line per reason, with the first layer that it holds for.

    """
    found: dict[str, list[str]] = {}
    for layer in layers:
        for reason in _layer_limits(layer, device_type):
            found.setdefault(reason, []).append(layer.layer_name)
    refuse(
        [
            f"{reason} ({len(names)} layers, the first is {names[0]})"
            for reason, names in found.items()
        ]
        + missing_ops(device_type)
    )


def refuse_several_kv_groups(kv_cache_config: KVCacheConfig) -> None:
    """Raise if the layers' KV is not one group; for Model Runner V2.

    Raises:
        ValueError: names the kinds of KV.

    """
    groups = kv_cache_config.kv_cache_groups
    kinds = ", ".join(type(group.kv_cache_spec).__name__ for group in groups)
    reason = (
        f"trees with {len(groups)} groups of KV cache ({kinds}) on Model Runner V2: "
        f"accepted rows are moved by one block table; {CHAIN}"
    )
    refuse([reason] if len(groups) > 1 else [])


def refuse_scattered_head(
    kv_cache_config: KVCacheConfig, head_layers: Collection[str]
) -> None:
    """Raise if vLLM put the KV of a head's layers into several groups.

    It fills up groups of equal size: with a target of fewer layers than the head, or
    one that has windows in a few of its layers only.

    Raises:
        ValueError: tells the number of groups.

    """
    groups = kv_cache_config.kv_cache_groups
    of_head = [g for g in groups if not set(head_layers).isdisjoint(g.layer_names)]
    reason = (
        f"a head whose {len(head_layers)} layers are in {len(of_head)} groups of KV "
        f"cache: they share one block table; {ONE_GROUP}"
    )
    refuse([reason] if len(of_head) > 1 else [])


def refuse_kv_with_gaps(layers: Iterable[Any], device_type: str) -> None:
    """Raise for KV blocks that are padded, which kernels for the CPU do not know.

    vLLM pads those of one group if the sizes of two do not divide.

    Raises:
        ValueError: tells the number of layers.

    """
    padded = [
        layer.layer_name for layer in layers if not layer.kv_cache.is_contiguous()
    ]
    reason = (
        f"trees with padded blocks of KV ({len(padded)} layers): those of a head and "
        f"of its target differ in size; {ONE_GROUP}, or {CHAIN}"
    )
    refuse([reason] if padded and device_type == "cpu" else [])


def _layer_limits(layer: Any, device_type: str) -> list[str]:
    """Why rows of trees cannot be sent to this layer."""
    backend = layer.get_attn_backend()
    if not understands_trees(backend):
        which = f"trees with the attention backend {backend.get_name()}"
        choice = "choose FLASH_ATTN or TRITON_ATTN (--attention-backend)"
        return [f"{which}: it cannot mask them; {choice}, or {CHAIN}"]
    if type(layer) is not Attention:
        return [f"trees with layers of type {type(layer).__name__}; {CHAIN}"]
    impl, dtype = layer.impl, layer.kv_cache_torch_dtype
    head_sizes, known = _head_sizes(layer.head_size, device_type)
    limits = {
        f"attention of type {impl.attn_type}": impl.attn_type != AttentionType.DECODER,
        "attention to both sides of a prefix": layer.use_mm_prefix,
        "attention sinks": impl.sinks is not None,
        "ALiBi": impl.alibi_slopes is not None,
        "a sliding window on CUDA": (
            layer.sliding_window is not None and device_type == "cuda"
        ),
        "chunked attention": getattr(impl, "chunk_lookback", -1) != -1,
        "KV shared between layers": layer.kv_sharing_target_layer_name is not None,
        f"{dtype} KV beside {layer.dtype} queries": dtype != layer.dtype,
        f"values of size {layer.head_size_v} beside keys of size {layer.head_size}": (
            layer.head_size != layer.head_size_v
        ),
        f"head size {layer.head_size} (known are {head_sizes})": not known,
    }
    return [
        f"trees with {what}: tree attention cannot compute it; {CHAIN}"
        for what, found in limits.items()
        if found
    ]


def _head_sizes(size: int, device_type: str) -> tuple[str, bool]:
    """Those that the kernels know, in words, and whether ``size`` is one of them."""
    if device_type == "cuda":
        return ", ".join(map(str, CUDA_HEAD_SIZES)), size in CUDA_HEAD_SIZES
    return "multiples of 16", size % 16 == 0


def missing_ops(device_type: str) -> list[str]:
    """Why the compiled ops cannot be used on CUDA, if they cannot."""
    served = ops.reference_is_asked_for() or ops.backend("cuda") == "native"
    if device_type != "cuda" or served:
        return []
    install = "pip install --no-build-isolation --no-deps --force-reinstall ."
    reason = (
        f"trees on CUDA without the compiled CUDA ops: only slow references are there; "
        f"install nvcc {torch.version.cuda}, point CUDA_HOME to it and reinstall "
        f"vllm-clover2 ('{install}'), set CLOVER2_OPS=reference to be slow, or {CHAIN}"
    )
    return [reason]
