# SPDX-License-Identifier: Apache-2.0
"""Random requests of all kinds through one clover2 engine, against a plain one.

    python tests/lossless/soak.py --requests 5000 --seed 1

Rounds of mixed requests arrive bit by bit, with priorities, into an engine with a small
KV cache, so that they are preempted and find each other's prefixes; some are aborted,
drafts are the head's own or planted ones. Text is that of plain vLLM, greedy or seeded,
and after every round nothing of it is left: no KV block, no draft. A round depends on
the seed and its number alone; a failure names both. Memory is reported, not judged.
"""

import argparse
import os
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engines import Engine, EnginePool, Output, Request, first_difference
from planting import CommitSpy, Planter, with_truth
from test_sampling import VARIANTS
from test_structured import GRAMMARS
from tiny_models import TinyModel, save_random_head, save_target
from vllm.sampling_params import StructuredOutputsParams

ROUND = 40
"""Requests."""
NEAR_TIE = 1e-4
"""Distance of two log-probabilities that float32 may bring in another order."""


@dataclass
class Soak:
    """Engines, and what has happened to them."""

    seed: int
    plain: Engine
    engine: Engine
    judge: Engine  # plain, and tells processed log-probabilities
    seen: Counter[str] = field(default_factory=Counter)
    memory: list[int] = field(default_factory=list)  # after each round

    @classmethod
    def start(cls, seed: int, engines: EnginePool, target: Path, head: Path) -> "Soak":
        small = {
            "block_size": 32,
            "num_gpu_blocks_override": 60,
            "max_num_batched_tokens": 256,
            "scheduling_policy": "priority",
        }
        # Whole prompts: stock vLLM's CPU runner dies of a seeded prompt in chunks.
        whole = {"max_num_batched_tokens": 8192}
        return cls(
            seed,
            engines.get(target, **whole),
            engines.get(target, head, **small),
            engines.get(target, logprobs_mode="processed_logprobs", **whole),
        )

    def run(self, first: int, rounds: int) -> None:
        for number in range(first, first + rounds):
            try:
                self.round(random.Random(f"{self.seed} {number}"))
            except AssertionError as error:
                raise AssertionError(
                    f"--seed {self.seed} --first-round {number}: {error}"
                ) from error

    def round(self, rng: random.Random) -> None:
        requests = [request(rng) for _ in range(ROUND)]
        expected = self.plain.run(requests)
        if rng.random() < 0.3:
            self.engine.forget_prefixes()
        given = requests
        with pytest.MonkeyPatch.context() as patch:
            commits = CommitSpy()
            commits.install(patch.setattr)
            self.count_preemptions(patch)
            if rng.random() < 0.7:
                given = with_truth(requests, expected)
                planter = Planter(rng.getrandbits(30), hit_rate=rng.random())
                planter.install(patch.setattr)
                self.seen["planted"] += 1
            finished = self.answers(given, rng)
        for number, output in finished.items():
            self.compare(requests[number], expected[number], output)
        self.seen["requests"] += len(finished)
        self.seen["accepted"] += commits.accepted
        self.seen["moved"] += commits.moved
        self.check_nothing_is_left()

    def answers(self, requests: list[Request], rng: random.Random) -> dict[int, Output]:
        """By the request's number, without those that were aborted."""
        ids: dict[str, int] = {}
        finished: dict[str, Output] = {}
        aborted: set[str] = set()
        waiting = list(enumerate(requests))[::-1]
        while waiting or self.engine.busy:
            for _ in range(min(rng.randint(0, 4), len(waiting))):
                number, arriving = waiting.pop()
                ids[self.engine.add(arriving, priority=rng.randint(0, 3))] = number
            finished |= self.engine.step()
            running = [i for i in ids if i not in finished and i not in aborted]
            if running and rng.random() < 0.03:
                aborted.add(victim := rng.choice(running))
                self.engine.abort(victim)
        self.seen["aborted"] += len(aborted)
        self.seen["prefix hits"] += sum(o.cached_tokens > 0 for o in finished.values())
        return {ids[i]: o for i, o in finished.items() if i not in aborted}

    def count_preemptions(self, patch: pytest.MonkeyPatch) -> None:
        stock = self.engine.scheduler._preempt_request

        def preempt(*args: Any, **options: Any) -> None:
            self.seen["preempted"] += 1
            stock(*args, **options)

        patch.setattr(self.engine.scheduler, "_preempt_request", preempt)

    def compare(self, request: Request, plain: Output, ours: Output) -> None:
        same = ("tokens", "text", "finish_reason", "stop_reason")
        if all(getattr(plain, name) == getattr(ours, name) for name in same):
            return
        at = first_difference(plain.tokens, ours.tokens)
        if at < min(len(plain.tokens), len(ours.tokens)) and self.is_tie(request, at):
            self.seen["ties"] += 1
            return
        raise AssertionError(
            f"{request}: token {at}: {plain.tokens[at : at + 4]}, "
            f"{plain.finish_reason}, {plain.stop_reason}; ours: "
            f"{ours.tokens[at : at + 4]}, {ours.finish_reason}, {ours.stop_reason}"
        )

    def is_tie(self, request: Request, at: int) -> bool:
        """Whether the two likeliest tokens of a greedy request are equally likely."""
        if request.params.get("temperature", 0.0):
            return False
        (output,) = self.judge.run([request.replaced(logprobs=2)])
        best = sorted(output.logprobs[at].values())[-2:]
        return best[-1] - best[0] < NEAR_TIE

    def check_nothing_is_left(self) -> None:
        # The worker hears of the last requests with the next step.
        self.engine.run([Request((1, 2, 3), {"max_tokens": 1})])
        pool = self.engine.scheduler.kv_cache_manager.block_pool
        # One block is vLLM's own, for padding.
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        runner = self.engine.runner
        left = {
            "drafts": runner.drafts._drafts,
            "waiting rows": runner.drafting.backlog._waiting,
            "expectations": runner.drafting._expected,
            "trust": runner.drafting.chooser._trust,
        }
        assert all(len(known) <= 1 for known in left.values()), left
        self.memory.append(psutil.Process().memory_info().rss)


def request(rng: random.Random) -> Request:
    """A random one: prompt, sampling parameters, where it stops, maybe a grammar."""
    prompt = [rng.randrange(3, 512) for _ in range(rng.choice((1, 5, 30, 100)))]
    if rng.random() < 0.3:  # a prefix that others have, too
        prompt = list(range(100, 100 + rng.choice((40, 90)))) + prompt
    if rng.random() < 0.3:
        prompt = prompt[-15:] * 3
    kinds = [v for name, v in VARIANTS.items() if name != "chosen-logprobs"]
    params = {"seed": rng.getrandbits(30), **rng.choice([{}, *kinds])}
    params["max_tokens"] = rng.choice((1, 2, 7, 20, 48, 90))
    params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
    draw = rng.random()
    if draw < 0.15:
        params["stop_token_ids"] = rng.sample(range(3, 512), 20)
    elif draw < 0.3:
        params["stop"] = rng.sample(["the", "a", "of", "e", "Work", "\n"], 2)
    elif draw < 0.4:
        grammar = StructuredOutputsParams(**rng.choice(GRAMMARS))
        params = {k: params[k] for k in ("seed", "max_tokens")}
        params |= {"structured_outputs": grammar, "ignore_eos": False}
        params["temperature"] = rng.choice((0.0, 0.9))
    return Request(tuple(prompt), params)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first-round", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        target = save_target(Path(folder, "target"), TinyModel())
        head = save_random_head(Path(folder, "head"), TinyModel())
        soak = Soak.start(arguments.seed, EnginePool(), target, head)
        soak.run(arguments.first_round, -(-arguments.requests // ROUND))
    memory = [f"{size >> 20} MiB" for size in (soak.memory[0], soak.memory[-1])]
    print(f"clean: {dict(soak.seen)}; memory after the first and last round {memory}")


if __name__ == "__main__":
    main()
