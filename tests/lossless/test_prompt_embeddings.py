# SPDX-License-Identifier: Apache-2.0
"""Prompt embeddings: nothing is drafted for such requests, others have their trees."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import CHUNKED, random_prompts
from engines import Engine, EnginePool
from planting import TRUTH, CommitSpy, Planter
from vllm import SamplingParams


@pytest.mark.parametrize("options", [{}, CHUNKED], ids=["roomy", "chunked"])
def test_beside_prompts_of_tokens(
    options: dict[str, Any],
    engines: EnginePool,
    target: Path,
    clover2: Callable[..., Engine],
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
    engine = clover2(**embeds, **options)
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
