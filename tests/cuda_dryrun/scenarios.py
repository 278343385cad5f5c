# SPDX-License-Identifier: Apache-2.0
"""What is run on the fake GPU, in a process of its own.

    python scenarios.py FOLDER_OF_VLLM WORK_FOLDER

Writes ``results.json`` to the work folder: for every scenario the differences from
plain vLLM's text, what was accepted and moved, and what went between host and device.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fake_gpu
import fake_vllm

TREES = {"num_speculative_tokens": 25, "adaptive": False}
GREEDY: dict[str, Any] = {}
SEEDED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
PENALTIES = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.1, "logprobs": 3}


@dataclasses.dataclass
class Scenario:
    """An engine with clover2 beside plain vLLM, over the same requests."""

    tree: dict[str, Any]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    planted: bool = True  # else the random head's own trees, of which few are accepted
    emulated: bool = False  # tree attention by the CUDA kernel, which takes a second
    requests: int = 8
    tokens: int = 24
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


SCENARIOS = {
    "own drafts": Scenario(TREES, planted=False),
    "own drafts, adaptive": Scenario({}, planted=False),
    "own drafts, penalties": Scenario(TREES, PENALTIES, planted=False),
    "own drafts, chain": Scenario({"tree": "chain"}, planted=False),
    "planted": Scenario(TREES),
    "own drafts, no head": Scenario(TREES | {"model": "none"}, planted=False),
    "planted, no head": Scenario(TREES | {"model": "none"}),
    "planted, static": Scenario({"tree": "static"}),
    "planted, chain": Scenario({"tree": "chain", "adaptive": False}),
    "planted, seeded": Scenario(TREES, SEEDED),
    "planted, penalties": Scenario(TREES, PENALTIES),
    "chunked prefill": Scenario(TREES, options={"max_num_batched_tokens": 48}),
    "preempted": Scenario(TREES, tokens=48, options={"num_gpu_blocks_override": 24}),
    "CUDA kernels": Scenario(TREES, requests=3, tokens=10, emulated=True),
}


def main(vllm_folder: Path, work: Path) -> None:
    fake_vllm.install(vllm_folder)
    from tiny_models import TinyModel, save_random_head, save_target

    shape = TinyModel(hidden_size=256)  # 64 is the least head size of our CUDA kernels
    target = save_target(work / "target", shape)
    head = save_random_head(work / "head", shape)
    bed = Bed(target, head)
    results = {name: bed.run(scenario) for name, scenario in SCENARIOS.items()}
    (work / "results.json").write_text(json.dumps(results))


class Bed:
    """The plain engine, and those with clover2 by their options."""

    def __init__(self, target: Path, head: Path) -> None:
        from engines import EnginePool

        self.target, self.head = target, head
        self.pool = EnginePool()
        # On a GPU plain vLLM runs Model Runner V2; its kernels are not stood in for.
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        self.plain = self._engine(async_scheduling=False)
        del os.environ["VLLM_USE_V2_MODEL_RUNNER"]

    def _engine(self, head: Path | None = None, **options: Any) -> Any:
        options = {"max_model_len": 256, "num_gpu_blocks_override": 64} | options
        return self.pool.get(self.target, head, **fake_vllm.ENGINE | options)

    def run(self, scenario: Scenario) -> dict[str, Any]:
        from engine_fixtures import random_prompts
        from engines import first_difference
        from planting import CommitSpy, Planter, with_truth

        requests = [
            request.replaced(**scenario.params, max_tokens=scenario.tokens)
            for request in random_prompts(scenario.requests, seed=1, longest=60)
        ]
        expected = self.plain.run(requests)
        engine = self._engine(self.head, tree=scenario.tree, **scenario.options)
        spy = CommitSpy()
        with ExitStack() as stack:
            stack.enter_context(emulated_attention(scenario.emulated))
            counts = stack.enter_context(counted(engine))
            if scenario.planted:
                patch = stack.enter_context(patches())
                spy.install(patch)
                chain = scenario.tree.get("tree") == "chain"
                Planter(7, chain=chain).install(patch)
                requests = with_truth(requests, expected)
            outputs = engine.run(requests)
        return {
            "runner": type(engine.runner).__name__,
            "differences": [
                (place, first_difference(plain.tokens, ours.tokens))
                for place, (plain, ours) in enumerate(zip(expected, outputs))
                if plain.tokens != ours.tokens
            ],
            "tokens": sum(len(output.tokens) for output in outputs),
            "accepted": spy.accepted,
            "moved": spy.moved,
            "drafts": dict(engine.runner.drafts.counts),
            **counts,
        }


@contextmanager
def patches() -> Iterator[Callable[[Any, str, Any], None]]:
    """Sets attributes until the end."""
    with ExitStack() as stack:

        def patch(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        yield patch


@contextmanager
def emulated_attention(emulated: bool) -> Iterator[None]:
    """Tree attention by the emulated CUDA kernel, or by the reference."""
    import torch

    from vllm_clover2.ops import reference

    operator = torch.ops.clover2.tree_attention.default
    kernel = fake_gpu.kernels[operator]
    if not emulated:
        fake_gpu.kernels[operator] = reference.tree_attention
    try:
        yield
    finally:
        fake_gpu.kernels[operator] = kernel


def _counting(stock: Callable[..., Any], counts: dict[str, Any], key: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        counts[key] += 1
        return stock(*args, **kwargs)

    return call


@contextmanager
def counted(engine: Any) -> Iterator[dict[str, Any]]:
    """Steps, preemptions, kernel launches and transfers while the engine runs."""
    counts: dict[str, Any] = {"steps": 0, "preempted": 0}
    transfers, emulator = fake_gpu.transfers, fake_gpu.emulator
    with patches() as patch:
        for owner, name, key in (
            (engine.runner, "execute_model", "steps"),
            (engine.scheduler, "_preempt_request", "preempted"),
        ):
            patch(owner, name, _counting(getattr(owner, name), counts, key))
        launched = emulator.emulated_kernels_run()
        transfers.counts.clear()
        transfers.counting = True
        try:
            yield counts
        finally:
            transfers.counting = False
    counts["kernels"] = emulator.emulated_kernels_run() - launched
    counts["transfers"] = [[*key, n] for key, n in transfers.counts.most_common()]


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
