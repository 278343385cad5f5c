# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --data-parallel-size 2``: two engines behind two API servers."""

import asyncio
import json
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

import openai
import pytest
from engine_fixtures import random_prompts
from engines import Engine, EnginePool, Request
from prometheus_client.parser import text_string_to_metric_families

from vllm_clover2.bench.server import server

pytestmark = pytest.mark.slow

LIMIT = 256
WATCHDOG = 60.0
"""Seconds in which a round is over unless an engine hangs; it takes a few."""


def of_length(length: int, count: int, seed: int, max_tokens: int) -> list[Request]:
    longest = random_prompts(8 * count, seed, longest=2 * LIMIT)
    prompts = [r.prompt[:length] for r in longest if len(r.prompt) >= length][:count]
    assert len(prompts) == count
    return [Request(prompt, {"max_tokens": max_tokens}) for prompt in prompts]


SHORT = of_length(20, 4, seed=150, max_tokens=60)
SAMPLED = [r.replaced(temperature=0.9, seed=i) for i, r in enumerate(SHORT)]
PREFILLING = of_length(200, 6, seed=151, max_tokens=8)  # takes 25 steps
NEAR_LIMIT = of_length(LIMIT - 24, 2, seed=152, max_tokens=24)
# What each of the two engines is asked at once.
ROUNDS: list[tuple[list[Request], list[Request]]] = [
    (SHORT[:2], []),
    (PREFILLING, NEAR_LIMIT),
    ([], SHORT[2:]),
    (NEAR_LIMIT[:1] + SAMPLED, SHORT[:1] + PREFILLING[:2]),
]


@pytest.fixture(scope="session")
def alone(engines: EnginePool, repeating: Path) -> Engine:
    """vLLM without speculation, in one process."""
    return engines.get(repeating)


async def answer(client: openai.AsyncOpenAI, rank: int, request: Request) -> list[int]:
    """Tokens that the engine of this rank answers."""
    params = request.sampling_params()
    completion = await client.completions.create(
        model="tiny",
        prompt=list(request.prompt),
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        seed=params.seed,
        extra_headers={"X-data-parallel-rank": str(rank)},
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return completion.choices[0].model_dump()["token_ids"]


async def all_rounds(url: str) -> list[list[list[int]]]:
    async with openai.AsyncOpenAI(
        base_url=url, api_key="none", timeout=WATCHDOG, max_retries=0
    ) as client:
        return [
            await asyncio.gather(
                *(answer(client, 0, request) for request in first),
                *(answer(client, 1, request) for request in second),
            )
            for first, second in ROUNDS
        ]


class Figures(NamedTuple):
    """What an engine did, as ``/metrics`` has it."""

    tokens: float
    steps: float  # of single requests
    drafts: float
    accepted: float


def figures(url: str) -> list[Figures]:
    """Figures of engines 0 and 1."""
    names = {
        "vllm:generation_tokens_total": "tokens",
        "vllm:clover2_request_steps_total": "steps",
        "vllm:clover2_accepted_depth_count": "drafts",
        "vllm:clover2_accepted_nodes_total": "accepted",
    }
    address = url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(address, timeout=30) as response:
        families = text_string_to_metric_families(response.read().decode())
        found = [dict.fromkeys(names.values(), 0.0) for _ in range(2)]
        for sample in (s for family in families for s in family.samples):
            if sample.name in names:
                engine = int(sample.labels["engine"])
                found[engine][names[sample.name]] += sample.value
    return [Figures(**of_engine) for of_engine in found]


def settled_figures(url: str) -> list[Figures]:
    """An answer may come by one API server, and figures of its steps by the other."""
    deadline = time.monotonic() + 20
    before, now = None, figures(url)
    while before != now:
        assert time.monotonic() < deadline, f"idle engines still count: {now}"
        time.sleep(1)
        before, now = now, figures(url)
    return now


def test_idle_prefilling_and_ending_ranks(
    alone: Engine, environment: Path, repeating: Path, head: Path
) -> None:
    expected = [
        [output.tokens for output in alone.run([*first, *second])]
        for first, second in ROUNDS
    ]
    speculative = {"method": "clover2", "model": str(head)}
    flags = [
        *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", str(LIMIT), "--max-num-batched-tokens", "48"),
        *("--kv-cache-memory-bytes", str(16 << 20), "--max-num-seqs", "8"),
        *("--speculative-config", json.dumps(speculative)),
        *("--data-parallel-size", "2"),
    ]
    log = environment / "data-parallel.log"
    with server([str(repeating), *flags], log) as url:
        answers = asyncio.run(all_rounds(url))
        counted = settled_figures(url)
    assert answers == expected
    assert "ApiServer_1" in log.read_text()
    for engine, of_engine in enumerate(counted):
        emitted = sum(sum(r.params["max_tokens"] for r in rs[engine]) for rs in ROUNDS)
        tokens, steps, drafts, accepted = of_engine
        assert tokens == emitted
        # A step gives a request one token and what was accepted, unless it ends there.
        assert 0 < drafts < steps <= tokens <= steps + accepted
