# SPDX-License-Identifier: Apache-2.0
"""Fixtures for tests that run engines in their own process."""

import functools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engine, EnginePool, Output, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from tiny_models import TinyModel, save_random_head, save_target

TINY = TinyModel()
_POOL = EnginePool()
# Options under which the scheduler cuts prompts and drafts, or takes requests' blocks.
CHUNKED = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
PREEMPTED = {"block_size": 32, "num_gpu_blocks_override": 20}


@pytest.fixture(scope="session")
def engines() -> Iterator[EnginePool]:
    """Starts engines on demand; they share this process and its threads.

    They live until the process ends: stopping any of them destroys the process group
    that all of them use.
    """
    set_num_threads, threads = torch.set_num_threads, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        # One thread: tiny matrices gain nothing from two, and pinning threads to
        # cores would fight with whatever else runs here.
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        set_num_threads(1)
        yield _POOL
    torch.set_num_threads = set_num_threads  # vLLM's worker had disabled it
    set_num_threads(threads)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer."""
    return save_target(tmp_path_factory.mktemp("target"), TINY)


@pytest.fixture(scope="session")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target that mostly looks at the last token: its text runs in circles."""
    return save_target(tmp_path_factory.mktemp("repeating"), TinyModel(init=0.05))


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random head for ``target``."""
    return save_random_head(tmp_path_factory.mktemp("head"), TINY)


@pytest.fixture(scope="session")
def clover2(engines: EnginePool, target: Path, head: Path) -> Callable[..., Engine]:
    """Engines that speculate with ``head``; takes a tree and arguments of ``LLM``."""
    return functools.partial(engines.get, target, head)


@pytest.fixture
def engine(clover2: Callable[..., Engine]) -> Engine:
    """The one that was told nothing more."""
    return clover2()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Planter]:
    """Replaces the head's trees for one test; takes ``Planter``'s arguments."""

    def install(seed: int, **options: object) -> Planter:
        planter = Planter(seed, **options)
        planter.install(monkeypatch.setattr)
        print(planter)  # shown if the test fails
        return planter

    return install


@pytest.fixture
def commits(monkeypatch: pytest.MonkeyPatch) -> CommitSpy:
    """What was accepted and moved during one test."""
    spy = CommitSpy()
    spy.install(monkeypatch.setattr)
    return spy


@pytest.fixture(scope="session")
def plain(engines: EnginePool, target: Path) -> Engine:
    """vLLM without speculation."""
    return engines.get(target)


class Baseline:
    """Answers of plain vLLM, each computed once."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[str, Output] = {}

    def __call__(self, requests: list[Request]) -> list[Output]:
        missing = {repr(r): r for r in requests if repr(r) not in self._known}
        outputs = self._engine.run(list(missing.values()))
        self._known.update(zip(missing, outputs, strict=True))
        return [self._known[repr(request)] for request in requests]


@pytest.fixture(scope="session")
def baseline(plain: Engine) -> Baseline:
    return Baseline(plain)


class PlantedRun:
    """Lets engines answer with planted trees; their text must be plain vLLM's."""

    def __init__(self, baseline: Baseline, plant: Callable[..., Planter]) -> None:
        self._baseline = baseline
        self._plant = plant

    def __call__(
        self,
        engine: Engine,
        requests: list[Request],
        expected: list[Output] | None = None,  # default: the baseline's
        truth: list[Output] | None = None,  # what is planted; default: what is expected
        concurrency: int | None = None,
        **planter: Any,  # arguments of ``Planter``
    ) -> list[Output]:
        expected = expected or self._baseline(requests)
        self._plant(**planter)
        actual = engine.run(with_truth(requests, truth or expected), concurrency)
        assert_same(expected, actual, requests)
        return actual


@pytest.fixture
def run_planted(baseline: Baseline, plant: Callable[..., Planter]) -> PlantedRun:
    return PlantedRun(baseline, plant)


@pytest.fixture
def assert_exact(run_planted: PlantedRun, commits: CommitSpy) -> Callable[..., None]:
    """Checks an engine's answers with its own trees, then with planted ones."""

    def check(
        engine: Engine, requests: list[Request], expected: list[Output], seed: int
    ) -> None:
        assert_same(expected, engine.run(requests), requests)
        engine.forget_prefixes()
        run_planted(engine, requests, expected, seed=seed)
        assert commits.moved > len(requests)

    return check


def random_prompts(count: int, seed: int, longest: int = 100) -> list[Request]:
    """Greedy requests with random prompts of 1 to ``longest`` tokens."""
    rng = random.Random(seed)
    return [
        Request(tuple(rng.randrange(3, 512) for _ in range(rng.randint(1, longest))))
        for _ in range(count)
    ]


def repeated_prompts(count: int, seed: int) -> list[Request]:
    """Greedy requests whose prompts are a dozen random tokens, three times."""
    rng = random.Random(seed)
    return [
        Request(tuple(rng.randrange(3, 512) for _ in range(12)) * 3)
        for _ in range(count)
    ]
