# SPDX-License-Identifier: Apache-2.0
"""A NaN in one request's hidden states and scores stays in this request.

Embedding of one token is NaN: the target's states, scores and KV of every text that
holds it are, and so are what a head makes of them.
"""

from pathlib import Path

import pytest
import torch
from engine_fixtures import TINY, PlantedRun, random_prompts
from engines import EnginePool, Request
from planting import CommitSpy
from test_sampling import VARIANTS
from tiny_models import save_target
from transformers import LlamaForCausalLM

SICK_TOKEN = 0


@pytest.fixture(scope="module")
def sick_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_target(tmp_path_factory.mktemp("sick"), TINY)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[SICK_TOKEN] = torch.nan
    model.save_pretrained(folder)
    return folder


def test_neighbours_are_well(
    engines: EnginePool,
    sick_target: Path,
    head: Path,
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    """All at once: where blocks of sick requests are used again, plain vLLM's other
    requests fall sick, too.
    """
    names = ["greedy", "top-p", "repetition", "min-p", "greedy-logprobs"]
    requests: list[Request] = []
    for i, request in enumerate(random_prompts(15, seed=94)):
        if i % 3 == 0:
            request = Request((*request.prompt, SICK_TOKEN, 7))
        requests.append(request.replaced(**VARIANTS[names[i % len(names)]], seed=i))
    expected = engines.get(sick_target).run(requests)
    sick, well = expected[::3], expected[1::3] + expected[2::3]
    assert all(len(set(output.tokens)) == 1 for output in sick)
    assert all(len(set(output.tokens)) > 20 for output in well)
    # The head's own trees are grown, too, but not used.
    run_planted(engines.get(sick_target, head), requests, expected, seed=94)
    assert commits.moved > len(requests)
