# SPDX-License-Identifier: Apache-2.0
"""Configurations that would give wrong text are refused, each with its reason."""

from pathlib import Path
from typing import Any

import pytest
from transformers import MistralConfig, MistralForCausalLM
from vllm.config import CUDAGraphMode, KVTransferConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_clover2.integration.limits import refuse_unsupported

CHAIN = {"tree": "chain"}


def engine_config(target: Path, head: Path, tree: Any = None, **options: Any) -> Any:
    speculative = {"method": "clover2", "model": str(head), **(tree or {})}
    args = EngineArgs(model=str(target), speculative_config=speculative, **options)
    return args.create_engine_config()


@pytest.fixture(params=[{}, CHAIN], ids=["tree", "chain"])
def config(request: pytest.FixtureRequest, target: Path, head: Path) -> VllmConfig:
    return engine_config(target, head, request.param)


def test_a_usual_configuration_is_accepted(config: VllmConfig) -> None:
    refuse_unsupported(config)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("pipeline_parallel_size", 2, "pipeline parallelism: .*any speculation"),
        ("decode_context_parallel_size", 2, "context parallelism"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
        ("enable_dbo", True, "micro-batching"),
    ],
)
def test_parallelism(
    config: VllmConfig,
    name: str,
    value: Any,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(config.parallel_config, name, value)
    with pytest.raises(ValueError, match=f"'clover2' does not support.*\n- {reason}"):
        refuse_unsupported(config)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("uses_mrope", "M-RoPE"),
        ("is_hybrid", "hybrid"),
        ("is_attention_free", "hybrid or attention-free"),
        ("use_mla", "MLA"),
    ],
)
def test_kinds_of_target(
    config: VllmConfig, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelConfig, name, True)
    with pytest.raises(ValueError, match=f"\n- {reason}.*; use a"):
        refuse_unsupported(config)


def test_kv_transfer(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    with pytest.raises(ValueError, match="\n- KV transfer: .*remove"):
        refuse_unsupported(config)


def test_every_reason_is_named_at_once(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(config.parallel_config, "enable_dbo", True)
    with pytest.raises(ValueError, match="pipeline") as error:
        refuse_unsupported(config)
    assert "\n- micro-batching: " in str(error.value)


# The same through the arguments of an engine, where nothing has been started yet.


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "KV transfer",
        ),
    ],
    ids=["pipeline", "kv-transfer"],
)
def test_engine_arguments(
    target: Path, head: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        engine_config(target, head, **options)
    EngineArgs(model=str(target), **options).create_engine_config()  # fine without us


@pytest.mark.parametrize(
    ("mode", "refused"),
    [
        ("FULL", True),
        ("FULL_DECODE_ONLY", True),
        ("FULL_AND_PIECEWISE", False),  # vLLM makes PIECEWISE of it
        ("PIECEWISE", False),
        ("NONE", False),
    ],
)
def test_graphs_of_whole_passes(
    config: VllmConfig, mode: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        config.compilation_config, "cudagraph_mode", CUDAGraphMode[mode]
    )
    if refused:
        with pytest.raises(ValueError, match='\n- CUDA graphs .* set .*"PIECEWISE"'):
            refuse_unsupported(config)
    else:
        refuse_unsupported(config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(
        ValueError, match="- clover2 without CUDA on Model Runner V2"
    ) as error:
        refuse_unsupported(config)
    assert "CUDA graphs" not in str(error.value)


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("parallel", "enable_batch_sharded_sampling", True, "batch-sharded sampling"),
        ("model", "return_sampling_mask", True, "sampling masks on Model Runner V2"),
        ("speculative", "enable_adaptive_verification", True, "adaptive verification"),
        ("speculative", "draft_sample_method", "probabilistic", "drafts that are sam"),
        ("speculative", "rejection_sample_method", "block", "drafts that are sampled"),
    ],
)
def test_model_runner_v2(
    config: VllmConfig,
    part: str,
    name: str,
    value: Any,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is refused on the CPU anyway, even where Triton is there."""
    monkeypatch.setattr(getattr(config, f"{part}_config"), name, value)
    refuse_unsupported(config)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(ValueError, match=f"- clover2 without CUDA on .*\n- {reason}"):
        refuse_unsupported(config)


def test_quantized_kv_is_for_chains_only(target: Path, head: Path) -> None:
    with pytest.raises(ValueError, match="quantized KV cache with trees"):
        engine_config(target, head, kv_cache_dtype="fp8")
    engine_config(target, head, CHAIN, kv_cache_dtype="fp8")


def test_sliding_windows_on_model_runner_v2_are_refused(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MistralConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    options = {"skip_tokenizer_init": True}
    tree = engine_config(tmp_path, head, **options)
    chain = engine_config(tmp_path, head, CHAIN, **options)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    reason = "- sliding-window attention with trees on CUDA or Model Runner V2"
    with pytest.raises(ValueError, match=reason):
        refuse_unsupported(tree)
    with pytest.raises(ValueError, match="- a head of clover2 beside sliding windows"):
        refuse_unsupported(chain)


def test_prompt_embeddings_on_model_runner_v2(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.model_config, "enable_prompt_embeds", True)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(ValueError, match="- prompt embeddings with clover2 on Model"):
        refuse_unsupported(config)


def test_another_model_runner_than_was_configured_for(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of vLLM's own decide as well."""
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(ValueError, match="\n- what makes vLLM itself take the other"):
        refuse_unsupported(config)


def test_data_parallelism_on_model_runner_v2(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a target without experts are engines of their own."""
    monkeypatch.setattr(config.parallel_config, "data_parallel_size", 2)
    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)
    with pytest.raises(ValueError, match="Model Runner V2") as dense:
        refuse_unsupported(config)
    monkeypatch.setattr(ModelConfig, "is_moe", True)
    with pytest.raises(ValueError, match="\n- data parallelism of targets with exp"):
        refuse_unsupported(config)
    assert "data parallelism" not in str(dense.value)
