# SPDX-License-Identifier: Apache-2.0
"""A tiny random target and its own answers, made once for all training tests."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_clover2.train.config import TrainConfig

VOCAB = 48
NUM_ANSWERS = 160


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Strong embeddings make a sharp, mostly bigram model: something that a
        # draft can learn from a hundred answers.
        model.get_input_embeddings().weight.normal_(std=0.5)
        model.get_output_embeddings().weight.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("tiny-target")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_answers(tiny_target: Path) -> Path:
    """Greedy answers to random prompts, in the format of `generate`."""
    model = LlamaForCausalLM.from_pretrained(tiny_target).eval()
    prompts = torch.randint(
        0, VOCAB, (NUM_ANSWERS, 6), generator=torch.Generator().manual_seed(4)
    )
    with torch.inference_mode():
        texts = model.generate(
            prompts, max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    path = tiny_target / "answers.jsonl"
    with path.open("w") as lines:
        for number, tokens in enumerate(texts.tolist()):
            # Unequal lengths, so that padding is exercised.
            end = len(tokens) - number % 7
            record = {
                "id": f"prompt-{number}",
                "task": "even" if number % 2 == 0 else "odd",
                "temperature": 0.0,
                "prompt_token_ids": tokens[:6],
                "output_token_ids": tokens[6:end],
            }
            lines.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state per process; runs here differ in precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001


@pytest.fixture
def tiny_config(tiny_target: Path, tiny_answers: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        target=str(tiny_target),
        answers=tiny_answers,
        output=tmp_path / "run",
        num_layers=1,
        num_draft_steps=3,
        steps=12,
        max_tokens=256,
        learning_rate=3e-3,
        warmup_steps=2,
        value_weight=1.0,
        validation_fraction=0.2,
        precision="fp32",
        log_every=4,
        evaluate_every=100,
        save_every=100,
    )
