# SPDX-License-Identifier: Apache-2.0
"""Structured output: such requests are drafted as chains, their neighbours as trees."""

from collections.abc import Callable
from typing import Any

import pytest
from engine_fixtures import Baseline, PlantedRun, random_prompts
from engines import Engine, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from vllm.sampling_params import StructuredOutputsParams

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"enum": ["a", "bb"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS: list[dict[str, Any]] = [
    {"json": PERSON},
    {"regex": r"(red|green|blue)( (dark|light)){2}"},
    {"choice": ["yes, of course", "no, never", "perhaps"]},
    {"json_object": True},
]


def constrained(**params: Any) -> list[Request]:
    prompts = random_prompts(2 * len(GRAMMARS), seed=50)
    return [
        request.replaced(
            structured_outputs=StructuredOutputsParams(**grammar),
            ignore_eos=False,
            seed=i,
            **params,
        )
        for i, (request, grammar) in enumerate(zip(prompts, GRAMMARS * 2, strict=True))
    ]


@pytest.mark.parametrize("budget", [2048, 64])
@pytest.mark.parametrize("planted_as", ["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_grammars_beside_trees(
    temperature: float,
    planted_as: str,
    budget: int,
    clover2: Callable[..., Engine],
    run_planted: PlantedRun,
    commits: CommitSpy,
) -> None:
    requests = constrained(temperature=temperature, min_tokens=3)
    requests += random_prompts(8, seed=51)
    requests += [r.replaced(seed=1, temperature=1.0) for r in random_prompts(4, 52)]
    engine = clover2(max_num_batched_tokens=budget, max_num_seqs=20)
    counts = engine.runner.drafts.counts
    seen = counts["structured output: drafted as a chain"]
    chain = planted_as == "chain"
    run_planted(engine, requests, seed=50, chain=chain, hit_rate=0.6)
    assert counts["structured output: drafted as a chain"] > seen
    assert commits.accepted > len(requests)
    if planted_as == "tree":
        assert commits.moved > 0


def test_chains_of_grammars_are_accepted(
    engine: Engine, baseline: Baseline, plant: Callable[..., Planter]
) -> None:
    """The grammar's mask lines up with the chain: planted tokens are taken."""
    requests = constrained()
    expected = baseline(requests)
    engine.run(requests)  # compiles the grammars, which takes steps of its own
    plant(seed=52, chain=True, hit_rate=1.0)
    ids = [engine.add(request) for request in with_truth(requests, expected)]
    outputs: dict[str, Any] = {}
    steps = 0
    while engine.busy:
        steps += bool(engine.scheduler.running)
        outputs |= engine.step()
    assert_same(expected, [outputs[i] for i in ids], requests)
    longest = max(len(output.tokens) for output in expected)
    assert steps < longest * 0.6
