# SPDX-License-Identifier: Apache-2.0
"""Prompt embeddings: nothing is drafted for such requests, others have their trees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import random_prompts
from engines import EnginePool
from planting import TRUTH, CommitSpy, Planter
from vllm import SamplingParams


@pytest.mark.parametrize("budget", [2048, 64], ids=["roomy", "chunked"])
def test_beside_prompts_of_tokens(
    budget: int,
    engines: EnginePool,
    target: Path,
    head: Path,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    torch.manual_seed(93)
    prompts: list[Any] = []
    for request in random_prompts(6, seed=93):
        prompts.append({"prompt_token_ids": list(request.prompt)})
        prompts.append({"prompt_embeds": torch.randn(len(request.prompt), 128)})
    params = [
        SamplingParams(
            temperature=0.9 * (i % 3 == 0), seed=i, max_tokens=30, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    answers = []
    embeds = {"enable_prompt_embeds": True}
    plain = engines.get(target, **embeds)
    options = {"max_num_batched_tokens": budget, "max_num_seqs": 8}
    engine = engines.get(target, head, **embeds, **options)
    plant(seed=93, hit_rate=0.6)
    for each in (plain, engine):
        outputs = each.llm.generate(prompts, params, use_tqdm=False)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
        for known, answer in zip(params, answers[-1]):
            known.extra_args = {TRUTH: answer}
    assert answers[0] == answers[1]
    assert commits.moved > len(prompts)
    counts = engine.runner.drafts.counts
    # One step less than tokens: after the last one nobody asks.
    assert counts["prompt embeddings: not drafted"] >= 6 * 29
