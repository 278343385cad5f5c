# SPDX-License-Identifier: Apache-2.0
"""Served evaluation against the offline replay of the same answers."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import TINY_TRAINING, TinyModel, save_target
from transformers import LlamaForCausalLM

from vllm_clover2 import cli
from vllm_clover2.model.weights import load_head, save_head
from vllm_clover2.train.config import EvaluateConfig, TrainConfig
from vllm_clover2.train.evaluate import evaluate
from vllm_clover2.train.loop import train

pytestmark = pytest.mark.slow

SHAPE = TinyModel(hidden_size=64, num_layers=2, num_heads=2, num_kv_heads=1, init=0.02)
PROMPT_LENGTH = 6


@pytest.fixture(scope="module")
def predictable_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharp, mostly bigram model with a tokenizer that ends some of its answers."""
    folder = save_target(tmp_path_factory.mktemp("predictable-target"), SHAPE)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        model.get_output_embeddings().weight.normal_(std=0.5)
        text = model.generate(prompts()[:1], max_new_tokens=20, do_sample=False)
    # Some token of the first answer ends all answers that come to it.
    model.config.eos_token_id = model.generation_config.eos_token_id = int(text[0, -1])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recorded(predictable_target: Path) -> Path:
    """Greedy answers of unequal lengths, in the format of `generate`."""
    model = LlamaForCausalLM.from_pretrained(predictable_target).eval()
    eos = model.config.eos_token_id
    with torch.inference_mode():
        texts = model.generate(
            prompts(), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    path = predictable_target / "answers.jsonl"
    ended = 0
    with path.open("w") as lines:
        for number, tokens in enumerate(texts.tolist()):
            output = tokens[PROMPT_LENGTH : len(tokens) - number % 7]
            if eos in output:
                output = output[: output.index(eos) + 1]
                ended += 1
            record = {
                "id": f"prompt-{number}",
                "task": ("even", "odd")[number % 2],
                "prompt_token_ids": tokens[:PROMPT_LENGTH],
                "output_token_ids": output,
            }
            lines.write(json.dumps(record) + "\n")
    assert 0 < ended < len(texts)
    return path


@pytest.fixture(scope="module")
def trained_head(
    predictable_target: Path, recorded: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A head that is right more often than not, in float32.

    Heads are saved in bfloat16, and served trees are grown in that below a float32
    target too; those of the replay in float32 are not.
    """
    folder = train(
        TrainConfig(
            target=str(predictable_target),
            answers=recorded,
            output=tmp_path_factory.mktemp("run"),
            draft_vocab_size=256,
            steps=80,
            **(TINY_TRAINING | {"max_tokens": 512}),
        )
    )
    save_head(load_head(folder), folder, torch.float32)
    return folder


def prompts() -> torch.Tensor:
    """Random prompts [160, PROMPT_LENGTH]."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(3, SHAPE.vocab_size, (160, PROMPT_LENGTH), generator=generator)


def test_served_counts_are_those_of_the_replay(
    predictable_target: Path, recorded: Path, trained_head: Path, tmp_path: Path
) -> None:
    output = tmp_path / "served.json"
    arguments = {
        "--target": predictable_target,
        "--answers": recorded,
        "--head": trained_head,
        "--trees": "chain:3",
        "--max-answers": 40,
        "--precision": "fp32",
        "--threads": 1,
        "--concurrency": 3,
        "--kv-cache-gib": 0.05,
        "--output": output,
    }
    words = [str(word) for option in arguments.items() for word in option]
    assert cli.main(["evaluate", "--served", *words]) == 0
    served = json.loads(output.read_text())["chain:3"]
    offline = evaluate(
        EvaluateConfig(
            target=str(predictable_target),
            answers=recorded,
            head=trained_head,
            trees=["chain:3"],
            max_answers=40,
            precision="fp32",
        )
    )["chain:3"]
    assert served.pop("answers") == served.pop("identical") == 40
    assert served.pop("tokens_per_second") > 0
    assert offline["accepted_per_step"] > 0.5  # otherwise little is compared
    for name in ("loop_free", "sources"):  # what only the replay can tell
        assert offline.pop(name)
    assert served == offline
