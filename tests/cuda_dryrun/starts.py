# SPDX-License-Identifier: Apache-2.0
"""Engines that are refused, or changed, when they start; in a process of its own.

    python starts.py FOLDER_OF_VLLM WORK_FOLDER

The GPU is a B200 (``scenarios.py`` has an H100). Writes ``results.json`` to the work
folder: the error of every start, or the attention backends of target and draft.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import fake_gpu
import fake_vllm

BFLOAT16 = {"dtype": "bfloat16"}
FULL_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL"},
}
WINDOW = {"hf_overrides": {"sliding_window": 64}}
# Options of the engine, of the head; whether it is loaded or only configured.
STARTS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "default": (BFLOAT16, {}, False),
    "default, chain": (BFLOAT16, {"tree": "chain"}, False),
    "float32": ({}, {}, False),
    "V1, async": ({"async_scheduling": True}, {}, False),
    "V1, full graphs": (FULL_GRAPHS, {}, False),
    "backend without trees": ({"attention_backend": "FLEX_ATTENTION"}, {}, True),
    "head size 32": ({"model": "small"}, {"model": "small-head"}, True),
    "no compiled ops": ({}, {}, True),
    "sliding window": (WINDOW, {}, False),
    "chosen, adaptive": ({}, {}, False),
    "chosen, whole trees": ({}, {"adaptive": False}, False),
    "chosen, static": ({}, {"tree": "static", "model": "head"}, False),
    "chosen, no head": ({}, {"model": "none"}, False),
    "chosen, prompt embeddings": ({"enable_prompt_embeds": True}, {}, False),
    "V1": ({}, {}, False),
    "V2": ({}, {}, False),
    "V2, full graphs": (FULL_GRAPHS, {}, False),
    "V2, async": ({"async_scheduling": True}, {}, False),
    "V2, no head": ({}, {"model": "none"}, False),
    "V2, by batch size": (
        {},
        {"num_speculative_tokens_per_batch_size": [[1, 4, 9]]},
        False,
    ),
    "V2, sliding window": (WINDOW, {}, False),
    "V2, sliding window, chain": (WINDOW, {"tree": "chain"}, False),
    "V2, sampled drafts": ({}, {"draft_sample_method": "probabilistic"}, False),
}


def main(vllm_folder: Path, work: Path) -> None:
    fake_gpu.CAPABILITY[:] = 10, 0
    fake_vllm.install(vllm_folder)
    from tiny_models import TinyModel, save_random_head, save_target

    for target, head, shape in (
        ("target", "head", TinyModel(hidden_size=256)),
        ("small", "small-head", TinyModel()),
    ):
        save_target(work / target, shape)
        save_random_head(work / head, shape)
    os.chdir(work)
    results: dict[str, Any] = {name: start(name, *STARTS[name]) for name in STARTS}
    results["quantized output"] = quantized_output()
    Path("results.json").write_text(json.dumps(results))


def start(
    name: str, options: dict[str, Any], head: dict[str, Any], load: bool
) -> list[Any] | str:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vllm_clover2 import ops

    arguments = {
        "model": "target",
        "max_model_len": 256,
        "num_gpu_blocks_override": 64,
        "speculative_config": {"method": "clover2", "model": "head"} | head,
    }
    arguments = fake_vllm.ENGINE | arguments | options
    backend = ops.backend
    if name == "no compiled ops":
        ops.backend = lambda _: "reference"
    if name.startswith("V"):
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(name.startswith("V2")))
    try:
        if load:
            LLM(**arguments)
            return "started"
        config = EngineArgs(**arguments).create_engine_config()
        if name.startswith(("V", "chosen")):
            runner = config.use_v2_model_runner
            widths = config.speculative_config.num_speculative_tokens_per_batch_size
            return [runner, config.scheduler_config.async_scheduling, widths]
        chosen = config.attention_config.backend
        of_draft = config.speculative_config.attention_backend
        return [backend and backend.name for backend in (chosen, of_draft)]
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        ops.backend = backend
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)


def quantized_output() -> list[bool]:
    """Whether TRITON_ATTN, stock and ours, writes what a compiled graph may ask for."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8StaticTensorSym,
    )

    from vllm_clover2.integration.attention_cuda import TreeTritonAttentionImpl

    ours = TreeTritonAttentionImpl.__new__(TreeTritonAttentionImpl)
    stock = super(TreeTritonAttentionImpl, ours)
    return [
        which.fused_output_quant_supported(kFp8StaticTensorSym)
        for which in (stock, ours)
    ]


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
