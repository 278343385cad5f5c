# SPDX-License-Identifier: Apache-2.0
"""Random requests of all kinds through clover2 engines, against a plain one.

In rounds, mixed requests arrive bit by bit, with priorities, at an engine with a small
KV cache: they are preempted and find each other's prefixes, some are aborted, at times
the prefix cache is emptied under way. Drafts are the head's own, for those that a fixed
cost of steps chooses, or planted ones, for those that coins choose. Text must be that
of plain vLLM, and after each round nothing may be left of it: no KV block, no request
in any of our structures.

A round follows from the seed and its number, but for the step in which a grammar is
ready; a failure tells both. What earlier rounds leave (block numbers, calibration)
matters rarely; a run from the first round has it.
"""

import ctypes
import gc
import random
import statistics
import sys
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from engines import Engine, EnginePool, Output, Request, first_difference
from planting import CommitSpy, Planter, with_truth
from test_sampling import LOGPROB_TOLERANCE, MIXED
from test_structured import GRAMMARS
from tiny_models import TinyModel
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from vllm_clover2.tree.chooser import Chooser
from vllm_clover2.tree.step_cost import StepCost

ROUND = 40
"""Requests; every fourth one goes on with the text of another."""
MAX_STEPS = 20_000
"""Of a round; most are spent on waiting for grammars."""
TREES: list[dict[str, Any] | None] = [
    {},
    {"tree": "chain"},
    {"num_speculative_tokens": 63},
    {"tree": "static"},
    None,  # no head
]
"""Options of the engines, which take turns."""
SMALL = {
    "block_size": 32,
    "num_gpu_blocks_override": 60,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
    "scheduling_policy": "priority",
}
OURS = ("drafts", "drafting", "stats")
"""What we add to a runner and keep from step to step."""
STOPS = ["the", "a", "of", "e", "Work", "\n"]


@dataclass
class Soak:
    """Engines, and what has happened to them."""

    seed: int
    plain: Engine
    tested: list[Engine]
    seen: Counter[str] = field(default_factory=Counter)
    memory: list["Memory"] = field(default_factory=list)  # after each round

    @classmethod
    def start(cls, seed: int, engines: EnginePool, target: Path, head: Path) -> "Soak":
        # Whole prompts: stock vLLM's CPU runner dies of a seeded prompt in chunks.
        plain = engines.get(target, max_num_batched_tokens=8192)
        tested = [
            engines.get(target, Path("none") if tree is None else head, tree, **SMALL)
            for tree in TREES
        ]
        return cls(seed, plain, tested)

    def run(self, rounds: range) -> None:
        for number in rounds:
            try:
                self.round(number)
            except Exception as error:
                error.add_note(f"soak: --seed {self.seed} --first-round {number}")
                raise
            self.memory.append(Memory.now())
            print(f"--seed {self.seed} --first-round {number}: {self.memory[-1]}")

    def round(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        torch.manual_seed(number)  # for requests without a seed
        place = number % len(self.tested)
        engine, tree = self.tested[place], TREES[place] or {}
        requests, expected = self.asked(rng)
        engine.forget_prefixes()
        fix_costs(engine, rng)
        given = requests
        with pytest.MonkeyPatch.context() as patch:
            commits = CommitSpy()
            commits.install(patch.setattr)
            self.count_preemptions(engine, patch)
            if rng.random() < 0.6:
                given = with_truth(requests, expected)
                is_chain = tree.get("tree") == "chain"
                planter = Planter(
                    rng.getrandbits(30),
                    depth=rng.choice((3, 5, 12)),
                    chain=is_chain,
                    hit_rate=rng.uniform(0.2, 0.9),
                )
                planter.install(patch.setattr)
                self.seen["planted rounds"] += 1
            finished = self.answers(engine, given, rng)
        for asked, output in finished.items():
            self.compare(requests[asked], expected[asked], output)
        self.seen["finished"] += len(finished)
        self.seen["accepted"] += commits.accepted
        self.seen["moved"] += commits.moved
        check_nothing_is_left(engine)

    def check_memory(self) -> None:
        """In the later half of the rounds requests have left nothing allocated.

        Until then caches fill: oneDNN keeps a thousand products that it has prepared,
        by number of rows, and vLLM 32 more for each layer. Later something may still be
        compiled once; what requests leave behind is there every time that all engines
        have had their turn, and so in the median.
        """
        late, turn = self.memory[len(self.memory) // 2 :], len(self.tested)
        python, native = (
            statistics.median(
                (getattr(after, kind) - getattr(before, kind)) / (turn * ROUND)
                for before, after in zip(late, late[turn:], strict=False)
            )
            for kind in ("python", "native")
        )
        print(f"left by a request: {python} Python objects, {native} bytes of malloc")
        assert python < 1.0
        assert native < 4 * TinyModel.hidden_size  # one row

    def asked(self, rng: random.Random) -> tuple[list[Request], list[Output]]:
        """A round's requests, and plain vLLM's answers."""
        requests = [random_request(rng) for _ in range(ROUND * 3 // 4)]
        outputs = self.plain.run(requests)
        again = []
        for asked in rng.sample(range(len(requests)), ROUND - len(requests)):
            text = outputs[asked].tokens
            prompt = (*requests[asked].prompt, *text[: rng.randint(0, len(text))])
            again.append(Request(prompt[:500], random_params(rng)))
        return requests + again, outputs + self.plain.run(again)

    def answers(
        self, engine: Engine, requests: list[Request], rng: random.Random
    ) -> dict[int, Output]:
        """By the request's number, without those that were aborted."""
        ids: dict[str, int] = {}
        finished: dict[str, Output] = {}
        aborted: set[str] = set()
        waiting = list(enumerate(requests))[::-1]
        for _ in range(MAX_STEPS):
            for _ in range(min(rng.randint(0, 4), len(waiting))):
                number, request = waiting.pop()
                ids[engine.add(request, priority=rng.randint(0, 3))] = number
            finished |= engine.step()
            running = [i for i in ids if i not in finished and i not in aborted]
            if running and rng.random() < 0.03:
                aborted.add(victim := rng.choice(running))
                engine.abort(victim)
            if rng.random() < 0.01:
                engine.llm.reset_prefix_cache(reset_running_requests=True)
                self.seen["resets"] += 1
            if not waiting and not engine.busy:
                break
        else:
            raise AssertionError(f"not finished: {set(ids) - set(finished) - aborted}")
        self.seen["aborted"] += len(aborted)
        self.seen["prefix hits"] += sum(o.cached_tokens > 0 for o in finished.values())
        return {ids[i]: o for i, o in finished.items() if i not in aborted}

    def count_preemptions(self, engine: Engine, patch: pytest.MonkeyPatch) -> None:
        stock = engine.scheduler._preempt_request

        def preempt(*args: Any, **options: Any) -> None:
            self.seen["preempted"] += 1
            stock(*args, **options)

        patch.setattr(engine.scheduler, "_preempt_request", preempt)

    def compare(self, request: Request, plain: Output, ours: Output) -> None:
        if request.params["temperature"] and "seed" not in request.params:
            return
        same = ("answers", "text", "finish_reason", "stop_reason")
        if all(getattr(plain, name) == getattr(ours, name) for name in same):
            compare_logprobs(request, plain, ours)
            return
        for number, (theirs, tokens) in enumerate(zip(plain.answers, ours.answers)):
            at = first_difference(theirs, tokens)
            if at == len(theirs) == len(tokens):
                continue
            if at < len(tokens) and self.is_tie(request, number, tokens[: at + 1]):
                self.seen["ties"] += 1
                return
            break
        raise AssertionError(
            f"{request}: answer {number}, token {at}: {theirs[at : at + 4]}, "
            f"{plain.finish_reason}, {plain.stop_reason}; ours: {tokens[at : at + 4]}, "
            f"{ours.finish_reason}, {ours.stop_reason}"
        )

    def is_tie(self, request: Request, number: int, tokens: list[int]) -> bool:
        """Whether plain vLLM takes the last of these tokens when its logit is larger by
        what float32 rounds.
        """
        bias = dict(request.params.get("logit_bias") or {})
        bias[tokens[-1]] = bias.get(tokens[-1], 0.0) + LOGPROB_TOLERANCE
        (nudged,) = self.plain.run([request.replaced(logit_bias=bias)])
        return nudged.answers[number][: len(tokens)] == tokens


class _HeapInfo(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class Memory(NamedTuple):
    """What this process has allocated and not freed."""

    python: int  # small blocks of Python objects
    native: int  # bytes of malloc
    resident: int  # bytes, also those that allocators keep

    @classmethod
    def now(cls) -> "Memory":
        gc.collect()
        mallinfo2 = ctypes.CDLL(None).mallinfo2
        mallinfo2.restype = _HeapInfo
        info = mallinfo2()
        native = info.uordblks + info.hblkhd
        resident = psutil.Process().memory_info().rss
        return cls(sys.getallocatedblocks(), native, resident)


def fix_costs(engine: Engine, rng: random.Random) -> None:
    """Steps cost what this round says and not what they take: a round is the same
    wherever it runs.
    """
    drafting = engine.runner.drafting
    if drafting.chooser is None:
        return
    rows = drafting.chooser.cost.max_rows
    slow = rng.choice((1.0, 8.0, 64.0))
    cost = StepCost([1, 8, rows], [1.0, 1.0, 1.0 + slow], (0.0,) * 2, (0.0,) * 2, rows)
    cost.observe = lambda _work, seconds: seconds
    drafting.chooser = Chooser(cost)
    drafting.chooser.earned = lambda *_: None  # the same: real seconds do not count


def compare_logprobs(request: Request, plain: Output, ours: Output) -> None:
    """Of tokens and of prompts; tokens that are equally likely may change places."""
    for kind in ("logprobs", "prompt_logprobs"):
        theirs, mine = getattr(plain, kind), getattr(ours, kind)
        assert (theirs is None) == (mine is None), f"{request}: {kind}"
        for at, (left, right) in enumerate(zip(theirs or [], mine or [], strict=True)):
            ranked = zip(sorted(left.values()), sorted(right.values()), strict=True)
            named = ((left[token], right[token]) for token in left.keys() & right)
            worst = max(abs(one - other) for one, other in (*ranked, *named))
            assert worst < LOGPROB_TOLERANCE, f"{request}: {kind} {at} off by {worst}"


def check_nothing_is_left(engine: Engine) -> None:
    """No KV block is in use, and nothing of ours names a request."""
    engine.step()  # the worker hears of the last requests
    # Those of aborted requests with n > 1 stay there: vLLM's own leak.
    engine.llm.llm_engine.output_processor.parent_requests.clear()
    pool = engine.scheduler.kv_cache_manager.block_pool
    # One block is vLLM's own, for padding.
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    ours = {name: getattr(engine.runner, name) for name in OURS}
    # Not the runner: vLLM keeps the names of its last step.
    places = list(naming_requests(ours, "runner", {id(engine.runner)}))
    assert not places, f"requests are gone, and still named in {places}"


def naming_requests(thing: Any, path: str, seen: set[int]) -> Iterator[str]:
    """Where a container or object of ours holds the id of a request."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, str):
        if "request-" in thing:  # as ``Engine.add`` names them
            yield path
    elif isinstance(thing, dict):
        for key, value in thing.items():
            yield from naming_requests(key, path, seen)
            yield from naming_requests(value, f"{path}.{key}", seen)
    elif isinstance(thing, list | tuple | set | deque):
        for part in thing:
            yield from naming_requests(part, path, seen)
    elif type(thing).__module__.startswith("vllm_clover2"):
        yield from naming_requests(vars(thing), path, seen)


def random_request(rng: random.Random) -> Request:
    length = rng.choice((1, 2, 5, 30, 30, 100, 100, rng.randint(400, 511)))
    prompt = [rng.randrange(3, 512) for _ in range(length)]
    if rng.random() < 0.3:  # a prefix that others have, too
        prompt = list(range(100, 100 + rng.choice((40, 90)))) + prompt
    if rng.random() < 0.3:  # text that repeats itself
        prompt = prompt[-15:] * 3
    return Request(tuple(prompt[:511]), random_params(rng))


def random_params(rng: random.Random) -> dict[str, Any]:
    """Sampling parameters of several kinds at once."""
    params: dict[str, Any] = {
        "temperature": 0.0,
        "seed": rng.getrandbits(30),
        "max_tokens": rng.choice((1, 2, 7, 20, 48, 90)),
        "ignore_eos": rng.random() < 0.5,
    }
    if rng.random() < 0.1:
        grammar = StructuredOutputsParams(**rng.choice(GRAMMARS))
        temperature = rng.choice((0.0, 0.9))
        changes = {"structured_outputs": grammar, "temperature": temperature}
        return params | changes | {"ignore_eos": False}
    for variant in rng.sample(MIXED, rng.choice((0, 1, 1, 2, 3))):
        params |= variant
    params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
    if rng.random() < 0.15:
        params["stop_token_ids"] = rng.sample(range(3, 512), 20)
    if rng.random() < 0.15:
        params["stop"] = rng.sample(STOPS, 2)
        params["include_stop_str_in_output"] = rng.random() < 0.5
    if rng.random() < 0.1:
        params["n"] = rng.choice((2, 3)) if params["temperature"] else 1
        params["output_kind"] = RequestOutputKind.FINAL_ONLY  # all answers at once
    if rng.random() < 0.05:
        del params["seed"]
    return params
