# SPDX-License-Identifier: Apache-2.0
"""A tiny random target and its own answers, made once for all training tests."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_models import TINY_TRAINING, save_predictable_target
from transformers import LlamaForCausalLM

from vllm_clover2.train.config import TrainConfig

VOCAB = 48
NUM_ANSWERS = 160


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable_target(
        tmp_path_factory.mktemp("tiny-target"),
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
    )


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
        steps=12,
        log_every=4,
        evaluate_every=100,
        save_every=100,
        **TINY_TRAINING,
    )
