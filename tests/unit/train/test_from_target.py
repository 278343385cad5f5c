# SPDX-License-Identifier: Apache-2.0
"""Drafts for targets of other families than Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)

from vllm_clover2.model.weights import load_head
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.loop import train

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FEED_FORWARD = {"intermediate_size": 48, "max_position_embeddings": 512}


def described(folder: Path, target: PreTrainedConfig, init_layers: str) -> TrainConfig:
    """A short run for a random model."""
    AutoModelForCausalLM.from_config(target).save_pretrained(folder / "target")
    answers = [
        {"id": str(n), "prompt_token_ids": [1, 2, 3], "output_token_ids": [4, 5, 6, 7]}
        for n in range(100)
    ]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in answers))
    return TrainConfig(
        target=str(folder / "target"),
        answers=path,
        output=folder / "run",
        init_layers=init_layers,
        steps=2,
        warmup_steps=1,
        save_every=2,
        evaluate_every=2,
        max_tokens=64,
        validation_fraction=0.1,
        precision="fp32",
    )


@pytest.mark.parametrize(
    "target",
    [
        GPTNeoXConfig(**SIZES, **FEED_FORWARD, layer_norm_eps=0.125),
        Starcoder2Config(
            **SIZES, **FEED_FORWARD, num_key_value_heads=2, norm_epsilon=0.125
        ),
    ],
    ids=lambda target: target.model_type,
)
def test_sizes_are_found_by_other_names(
    tmp_path: Path, target: PreTrainedConfig
) -> None:
    found = load_head(train(described(tmp_path, target, "random"))).config
    assert found.num_attention_heads == 4
    assert found.num_key_value_heads == getattr(target, "num_key_value_heads", 4)
    assert found.intermediate_size == 48
    assert found.rms_norm_eps == 0.125


@pytest.mark.parametrize(
    ("target", "init_layers", "problem"),
    [
        (FalconConfig(**SIZES), "last", "not Llama-shaped.*init_layers=random"),
        (
            GPTNeoXConfig(**SIZES, **FEED_FORWARD),
            "first",
            "not Llama-shaped.*init_layers=random",
        ),
        (PhiConfig(**SIZES, **FEED_FORWARD), "random", "PhiForCausalLM's has one"),
        (
            GPTBigCodeConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
            "random",
            "one of .*'n_inner'.*gpt_bigcode's has none",
        ),
    ],
    ids=["no layers of that name", "other layers", "bias", "a size is missing"],
)
def test_what_no_draft_can_be_made_for_is_named(
    tmp_path: Path, target: PreTrainedConfig, init_layers: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        train(described(tmp_path, target, init_layers))
