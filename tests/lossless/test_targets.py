# SPDX-License-Identifier: Apache-2.0
"""Targets of other architectures, and engine options that change how they run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import TINY, Baseline, PlantedRun, random_prompts
from engines import Engine, EnginePool, Request, assert_same
from planting import CommitSpy
from safetensors.torch import save_file
from tiny_models import save_other_target, save_random_head
from vllm.lora.request import LoRARequest

TARGETS: dict[str, dict[str, Any]] = {
    "tied-llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-scaled-rope": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "qwen2": {"model_type": "qwen2"},  # biases
    "qwen3": {"model_type": "qwen3", "head_dim": 64},  # norms of queries and keys
}


@pytest.mark.parametrize("name", TARGETS)
def test_planted_trees(
    name: str,
    engines: EnginePool,
    head: Path,
    assert_exact: Callable[..., None],
    tmp_path: Path,
) -> None:
    target = save_other_target(tmp_path, TARGETS[name])
    requests = random_prompts(12, seed=130)
    requests += [r.replaced(temperature=0.8, seed=7) for r in random_prompts(4, 131)]
    options = {"skip_tokenizer_init": True, "block_size": 32}
    expected = engines.get(target, **options).run(requests)
    engine = engines.get(target, head, **options)
    assert_exact(engine, requests, expected, seed=130)


def test_head_with_other_kv_than_the_targets(
    engines: EnginePool,
    target: Path,
    run_planted: PlantedRun,
    commits: CommitSpy,
    tmp_path: Path,
) -> None:
    """The draft's cache entries are larger than the target's."""
    head = save_random_head(tmp_path, TINY, num_key_value_heads=4, head_dim=64)
    requests = [r.replaced(max_tokens=100) for r in random_prompts(12, seed=132)]
    run_planted(engines.get(target, head, block_size=32), requests, seed=132)
    assert commits.moved > len(requests)


@pytest.mark.parametrize("size", [None, 100], ids=["all-tokens", "draft-vocabulary"])
def test_head_stored_in_bf16(
    size: int | None,
    engines: EnginePool,
    target: Path,
    baseline: Baseline,
    tmp_path: Path,
) -> None:
    """Its recurrent part stays in bf16 beside a float32 target."""
    head = save_random_head(tmp_path, TINY, torch.bfloat16, draft_vocab_size=size)
    requests = random_prompts(12, seed=136)
    engine = engines.get(target, head)
    assert engine.runner.drafter.model.recurrent.first.weight.dtype == torch.bfloat16
    assert_same(baseline(requests), engine.run(requests), requests)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "AVX2",
    reason="vLLM's KV cache in FP8 needs AVX-512 or AMX",
)
def test_chain_with_quantized_kv(
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
) -> None:
    requests = random_prompts(12, seed=133)
    options = {"kv_cache_dtype": "fp8", "dtype": "bfloat16"}
    expected = engines.get(target, **options).run(requests)
    chain = {"tree": "chain", "num_speculative_tokens": 5}
    engine = clover2(chain, **options)
    run_planted(engine, requests, expected, seed=133, chain=True, hit_rate=0.9)


def test_without_prefix_caching(
    clover2: Callable[..., Engine], run_planted: PlantedRun, commits: CommitSpy
) -> None:
    requests = random_prompts(12, seed=134)
    run_planted(clover2(enable_prefix_caching=False), requests, seed=134)
    assert commits.moved > len(requests)


def save_adapter(folder: Path, seed: int) -> Path:
    """A LoRA on queries and values, strong enough to be seen in every text."""
    folder.mkdir()
    torch.manual_seed(seed)
    rank, head_size = 8, TINY.hidden_size // TINY.num_heads
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(TINY.num_layers):
        for name, heads in (("q_proj", TINY.num_heads), ("v_proj", TINY.num_kv_heads)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            down = torch.randn(rank, TINY.hidden_size) * TINY.init
            up = torch.randn(heads * head_size, rank) * TINY.init
            tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_adapters_beside_the_base_model(
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
    tmp_path: Path,
) -> None:
    adapters = [
        LoRARequest(f"adapter-{i}", i, str(save_adapter(tmp_path / f"{i}", seed=i)))
        for i in (1, 2)
    ]
    options = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    requests = [
        replace(request, lora=adapter)
        for request in random_prompts(5, seed=137)
        for adapter in (*adapters, None)
    ]
    expected = engines.get(target, **options).run(requests)
    for first, second in zip(expected[::3], expected[1::3]):  # of the same prompts
        assert first.tokens != second.tokens
    run_planted(clover2(**options), requests, expected, seed=137)
    assert commits.moved > len(requests)


def test_thinking_budget(
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    """Such requests are not drafted for; their neighbours keep their trees."""
    # Thinking starts with token 40 and is ended by force after the budget.
    options = {
        "reasoning_config": {"reasoning_start_str": "E", "reasoning_end_str": "of a"}
    }
    plain = engines.get(target, **options)
    start = plain.llm.get_tokenizer().encode("E", add_special_tokens=False)
    requests = random_prompts(8, seed=135)
    budgets = [
        Request((*request.prompt, *start), {"thinking_token_budget": 5 + i})
        for i, request in enumerate(requests[:4])
    ]
    requests = [*budgets, *requests[4:]]
    expected = plain.run(requests)
    free = plain.run([r.replaced(thinking_token_budget=None) for r in budgets])
    assert [o.tokens for o in free] != [o.tokens for o in expected[:4]]  # it acts
    engine = clover2(**options)
    counts = engine.runner.drafts.counts
    seen = counts["thinking budget: not drafted"]
    run_planted(engine, requests, expected, seed=135)
    assert counts["thinking budget: not drafted"] > seen
    assert counts["requests, excluded"] == counts["thinking budget: not drafted"]
    assert commits.accepted > 4
