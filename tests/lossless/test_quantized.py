# SPDX-License-Identifier: Apache-2.0
"""Quantised targets: the head beside them is not quantised."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from engine_fixtures import TINY, random_prompts
from engines import EnginePool
from safetensors.torch import load_file, save_file
from tiny_models import save_target

GROUP = 32  # input rows that share a scale in 4-bit weights

Tensors = dict[str, torch.Tensor]


def int8(weight: torch.Tensor) -> Tensors:
    """A scale for each output; weight [out, in]."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def random_words(*shape: int) -> torch.Tensor:
    """Eight random 4-bit numbers in each int32."""
    return torch.randint(-(2**31), 2**31, shape).int()


def int4(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    return {
        "weight_packed": random_words(outputs, inputs // 8),
        "weight_scale": torch.rand(outputs, inputs // GROUP) / 10,
        "weight_shape": torch.tensor(weight.shape),
    }


def gptq(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    return {
        "qweight": random_words(inputs // 8, outputs),
        # 7 = 8 - 1 in each: a zero in the middle.
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x77777777).int(),
        "scales": torch.rand(inputs // GROUP, outputs) / 10,
        "g_idx": torch.arange(inputs).int() // GROUP,
    }


def awq(weight: torch.Tensor) -> Tensors:
    outputs, inputs = weight.shape
    return {
        "qweight": random_words(inputs, outputs // 8),
        "qzeros": random_words(inputs // GROUP, outputs // 8),
        "scales": torch.rand(inputs // GROUP, outputs) / 10,
    }


def compressed_tensors(
    layout: str, weights: dict[str, Any], activations: dict[str, Any] | None = None
) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": common | weights,
        "input_activations": activations and common | activations,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


class Scheme(NamedTuple):
    quantize: Callable[[torch.Tensor], Tensors]
    config: dict[str, Any]


SCHEMES = {
    "w8a8": Scheme(
        int8,
        compressed_tensors(
            "int-quantized",
            {"num_bits": 8, "strategy": "channel"},
            {"num_bits": 8, "strategy": "token", "dynamic": True},
        ),
    ),
    "w4a16": Scheme(
        int4,
        compressed_tensors(
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": GROUP},
        ),
    ),
    "gptq": Scheme(
        gptq,
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": GROUP,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
        },
    ),
    "awq": Scheme(
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": GROUP,
            "zero_point": True,
            "version": "gemm",
        },
    ),
}


def save_quantized_target(folder: Path, scheme: Scheme) -> Path:
    """A tiny Llama whose linear layers are quantised."""
    save_target(folder, TINY)
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = {}
    for name, tensor in load_file(file).items():
        if name.endswith("_proj.weight"):
            module = name.removesuffix("weight")
            parts = scheme.quantize(tensor)
            tensors |= {module + part: value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    config["quantization_config"] = scheme.config
    config_file.write_text(json.dumps(config))
    return folder


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="vLLM's kernels for 4-bit weights need AVX-512, and bf16 differs without it",
)
@pytest.mark.parametrize("name", SCHEMES)
def test_planted_trees(
    name: str,
    engines: EnginePool,
    head: Path,
    assert_exact: Callable[..., None],
    tmp_path: Path,
) -> None:
    scheme = SCHEMES[name]
    target = save_quantized_target(tmp_path, scheme)
    requests = [r.replaced(max_tokens=24) for r in random_prompts(6, seed=140)]
    expected = engines.get(target, dtype="bfloat16").run(requests)
    assert len({tuple(output.tokens) for output in expected}) == len(requests)
    engine = engines.get(target, head, dtype="bfloat16")
    assert_exact(engine, requests, expected, seed=140)
