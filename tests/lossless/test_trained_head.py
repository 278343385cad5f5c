# SPDX-License-Identifier: Apache-2.0
"""From a target to a served head: answers, training, serving."""

import json
import random
from pathlib import Path

from accelerate.state import AcceleratorState
from engines import EnginePool, Output, Request, assert_same
from planting import CommitSpy
from tiny_models import TINY_TRAINING, save_predictable_target

from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.loop import train

VOCAB = 48
# By trees of 8 nodes; an untrained head has 0.0.
ACCEPTED_FLOOR = 1.0


def save_answers(path: Path, requests: list[Request], outputs: list[Output]) -> Path:
    with path.open("w") as lines:
        for number, (request, output) in enumerate(zip(requests, outputs)):
            answer = {"id": f"{number}", "prompt_token_ids": request.prompt}
            lines.write(json.dumps(answer | {"output_token_ids": output.tokens}) + "\n")
    return path


def test_training_ends_in_a_head_that_serves(
    engines: EnginePool, tmp_path: Path, commits: CommitSpy
) -> None:
    # Heads of 32, the smallest that vLLM's CPU attention has.
    target = save_predictable_target(
        tmp_path / "target", hidden_size=64, num_heads=2, num_kv_heads=1
    )
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
            draft_vocab_size=40,
            steps=200,
            **TINY_TRAINING,
        )
    )
    AcceleratorState._reset_state(reset_partial_state=True)

    tree = {"num_speculative_tokens": 8, "top_k": 4, "depth": 3, "adaptive": False}
    actual = engines.get(target, head, tree, **options).run(requests[seen:])
    assert_same(expected[seen:], actual, requests[seen:])
    assert commits.accepted > ACCEPTED_FLOOR * commits.paths.total() > 0
