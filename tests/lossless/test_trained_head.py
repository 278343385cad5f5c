# SPDX-License-Identifier: Apache-2.0
"""From a target to a served head: answers, training, serving."""

import json
import random
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from engines import EnginePool, Output, Request, assert_same
from planting import CommitSpy
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.loop import train

VOCAB = 48
# By trees of 8 nodes; an untrained head has 0.0.
ACCEPTED_FLOOR = 1.0


def save_predictable_target(folder: Path) -> Path:
    """A random 2-layer Llama whose strong embeddings make its text easy to learn."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        model.get_output_embeddings().weight.normal_(std=0.5)
    model.save_pretrained(folder)
    return folder


def save_answers(path: Path, requests: list[Request], outputs: list[Output]) -> Path:
    with path.open("w") as lines:
        for number, (request, output) in enumerate(zip(requests, outputs)):
            answer = {"id": f"{number}", "prompt_token_ids": request.prompt}
            lines.write(json.dumps(answer | {"output_token_ids": output.tokens}) + "\n")
    return path


def test_training_ends_in_a_head_that_serves(
    engines: EnginePool, tmp_path: Path, commits: CommitSpy
) -> None:
    target = save_predictable_target(tmp_path / "target")
    rng = random.Random(4)
    requests = [
        Request(tuple(rng.randrange(VOCAB) for _ in range(6)), {"max_tokens": 24})
        for _ in range(160)
    ]
    options = {"skip_tokenizer_init": True}
    expected = engines.get(target, **options).run(requests)
    # The last prompts are not trained on.
    seen = 140
    head = train(
        TrainConfig(
            target=str(target),
            answers=save_answers(tmp_path / "a.jsonl", requests[:seen], expected),
            output=tmp_path / "run",
            num_layers=1,
            num_draft_steps=3,
            draft_vocab_size=40,
            steps=200,
            max_tokens=256,
            learning_rate=3e-3,
            warmup_steps=2,
            value_weight=1.0,
            validation_fraction=0.2,
            precision="fp32",
        )
    )
    AcceleratorState._reset_state(reset_partial_state=True)

    tree = {"num_speculative_tokens": 8, "top_k": 4, "depth": 3, "adaptive": False}
    actual = engines.get(target, head, tree, **options).run(requests[seen:])
    assert_same(expected[seen:], actual, requests[seen:])
    assert commits.accepted > ACCEPTED_FLOOR * commits.paths.total() > 0
