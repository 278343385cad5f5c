# SPDX-License-Identifier: Apache-2.0
"""What is run on the fake GPU, in a process of its own.

    python scenarios.py FOLDER_OF_VLLM WORK_FOLDER

Writes ``results.json`` to the work folder: for every scenario the differences from
plain vLLM's text, what was accepted and moved, and what went between host and device.
"""

import dataclasses
import itertools
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
CHAINS = {"tree": "chain", "adaptive": False}
BY_BATCH_SIZE = [[1, 5, 25], [6, 8, 8], [9, 32, 0]]
GREEDY: dict[str, Any] = {}
SEEDED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}
PENALTIES = {"temperature": 0.9, "seed": 5, "repetition_penalty": 1.1, "logprobs": 3}
BAD_WORDS = {"bad_words": ["a", "th"], "temperature": 0.7, "seed": 1}
BIAS = {"logit_bias": {5: 4.0, 17: -100.0}, "min_tokens": 5}
MIN_P = {"min_p": 0.2, "temperature": 1.1, "seed": 2}
GRAMMAR = {"grammar": "[a-d]{200}"}


@dataclasses.dataclass
class Scenario:
    """An engine with clover2 beside plain vLLM, over the same requests."""

    tree: dict[str, Any]
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    planted: bool = True  # else the random head's own trees, of which few are accepted
    inner_layers: bool = False  # whether the head reads states of the target's
    emulated: bool = False  # tree attention by the CUDA kernel, which takes a second
    requests: int = 8
    tokens: int = 24
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    others: tuple[dict[str, Any], ...] = ()  # parameters of every further request
    aborted: int = 0  # requests that are aborted after a few steps
    widths: tuple[int, ...] = ()  # that adaptive trees are to have, one after the other
    graphs: bool = False  # replay CUDA graphs where there are any
    runner: str = "V1"

    def params_of(self, number: int) -> dict[str, Any]:
        """Sampling parameters of one request."""
        from vllm.sampling_params import StructuredOutputsParams

        kinds = (self.params, *self.others)
        params = dict(kinds[number % len(kinds)])
        if (grammar := params.pop("grammar", None)) is not None:
            params["structured_outputs"] = StructuredOutputsParams(regex=grammar)
        return params


SCENARIOS = {
    "own drafts": Scenario(TREES, planted=False, inner_layers=True),
    "own drafts, adaptive": Scenario({}, planted=False),
    "own drafts, penalties": Scenario(TREES, PENALTIES, planted=False, tokens=16),
    "own drafts, chain": Scenario({"tree": "chain"}, planted=False, tokens=16),
    "planted": Scenario(TREES),
    "own drafts, no head": Scenario(TREES | {"model": "none"}, planted=False),
    "planted, no head": Scenario(TREES | {"model": "none"}),
    "planted, static": Scenario({"tree": "static"}),
    "planted, chain": Scenario(CHAINS),
    "planted, seeded": Scenario(TREES, SEEDED),
    "planted, penalties": Scenario(TREES, PENALTIES),
    "chunked prefill": Scenario(TREES, options={"max_num_batched_tokens": 48}),
    "preempted": Scenario(TREES, tokens=48, options={"num_gpu_blocks_override": 24}),
    "CUDA kernels": Scenario(TREES, requests=3, tokens=10, emulated=True),
}
OF_RUNNER_V2 = {
    "own drafts": Scenario(TREES, planted=False, inner_layers=True),
    "own drafts, penalties": Scenario(TREES, PENALTIES, planted=False, tokens=16),
    "own drafts, chain": Scenario(CHAINS, planted=False, tokens=16),
    "planted, synchronous": Scenario(
        TREES, SEEDED, options={"async_scheduling": False}
    ),
    "CUDA kernels": Scenario(TREES, requests=3, tokens=10, emulated=True),
}
WITH_GRAPHS = {
    "own drafts": Scenario(TREES, planted=False, inner_layers=True),
    "own drafts, no head": Scenario(TREES | {"model": "none"}, planted=False),
    "planted, static": Scenario({"tree": "static"}),
    "planted, chain": Scenario(CHAINS),
    "planted, all kinds": Scenario(
        TREES, requests=12, others=(SEEDED, PENALTIES, BAD_WORDS, GRAMMAR, BIAS, MIN_P)
    ),
    "planted, by batch size": Scenario(
        TREES | {"num_speculative_tokens_per_batch_size": BY_BATCH_SIZE},
        requests=12,
        aborted=4,
    ),
    # Where memory is profiled, graphs are captured for that, and dropped.
    "chunked prefill": Scenario(
        TREES, options={"max_num_batched_tokens": 104, "kv_cache_memory_bytes": None}
    ),
    "preempted": Scenario(TREES, tokens=48, options={"num_gpu_blocks_override": 24}),
    "own drafts, adaptive": Scenario({}, planted=False, widths=(25, 0, 8, 2, 0)),
    "own drafts, no head, adaptive": Scenario({"model": "none"}, planted=False),
    "planted, adaptive": Scenario(
        {}, others=(SEEDED, PENALTIES, GRAMMAR), widths=(25, 8, 0, 2, 25)
    ),
    "aborted": Scenario(TREES, requests=12, aborted=3, options={"max_num_seqs": 4}),
    "planted, piecewise": Scenario(TREES, options=fake_vllm.graphs_of("PIECEWISE")),
    "planted, full": Scenario(TREES, options=fake_vllm.graphs_of("FULL")),
    # Three requests in the graph of four.
    "CUDA kernels": Scenario(
        TREES,
        requests=3,
        tokens=10,
        emulated=True,
        options=fake_vllm.graphs_of("FULL_AND_PIECEWISE", 1, 2, 4, 51, 104),
    ),
}
OF_RUNNER_V2 |= {
    f"graphs, {name}": dataclasses.replace(scenario, graphs=True)
    for name, scenario in WITH_GRAPHS.items()
}
SCENARIOS |= {
    f"V2, {name}": dataclasses.replace(scenario, runner="V2")
    for name, scenario in OF_RUNNER_V2.items()
}


def main(vllm_folder: Path, work: Path) -> None:
    fake_vllm.install(vllm_folder)
    from tiny_models import TinyModel, save_random_head, save_target

    shape = TinyModel(hidden_size=256)  # 64 is the least head size of our CUDA kernels
    target = save_target(work / "target", shape)
    head = save_random_head(work / "head", shape)
    reading = save_random_head(
        work / "reading-head", shape, aux_hidden_state_layers=[1, 2]
    )
    bed = Bed(target, {False: head, True: reading})
    results = {name: bed.run(scenario) for name, scenario in SCENARIOS.items()}
    (work / "results.json").write_text(json.dumps(results))


class Bed:
    """The plain engines, and those with clover2 by their options."""

    def __init__(self, target: Path, heads: dict[bool, Path]) -> None:
        from engines import EnginePool

        self.target = target
        self.heads = heads  # by whether they read inner layers
        self.pools = {"V1": EnginePool(), "V2": EnginePool()}

    def _engine(
        self, scenario: Scenario, head: Path | None = None, **options: Any
    ) -> Any:
        options = {"max_model_len": 256, "num_gpu_blocks_override": 64} | options
        pool = self.pools[scenario.runner]
        return pool.get(self.target, head, **fake_vllm.ENGINE | options)

    def run(self, scenario: Scenario) -> dict[str, Any]:
        from engine_fixtures import random_prompts

        requests = [
            request.replaced(**scenario.params_of(number), max_tokens=scenario.tokens)
            for number, request in enumerate(
                random_prompts(scenario.requests, seed=1, longest=60)
            )
        ]
        v2 = scenario.runner == "V2"
        with model_runner(v2):
            # On V1, plain vLLM of a GPU would be asynchronous.
            asynchronous = {} if v2 else {"async_scheduling": False}
            plain = self._engine(scenario, **asynchronous)
            expected = plain.run(requests)
        with model_runner(v2):
            return self._beside(scenario, requests, expected)

    def _beside(
        self, scenario: Scenario, requests: list[Any], expected: list[Any]
    ) -> dict[str, Any]:
        from engines import first_difference
        from planting import CommitSpy, with_truth
        from recording import record

        options = (fake_vllm.GRAPHS if scenario.graphs else {}) | scenario.options
        spy = CommitSpy()
        with ExitStack() as stack:
            # The engine's graphs hold what runs now.
            stack.enter_context(emulated_attention(scenario.emulated))
            head = self.heads[scenario.inner_layers]
            engine = self._engine(scenario, head, tree=scenario.tree, **options)
            counts = stack.enter_context(counted(engine))
            patch = stack.enter_context(patches())
            force_widths(scenario.widths, patch)
            trees = {}
            if not scenario.planted:
                trees = record(engine.runner, patch)
            else:
                spy.install(patch)
                install_planter(scenario, engine, patch)
                requests = with_truth(requests, expected)
            outputs = run_aborting(engine, requests, scenario.aborted)
        pairs = [
            (place, expected[place], ours)
            for place, ours in enumerate(outputs)
            if ours is not None
        ]
        return {
            "runner": type(engine.runner).__name__,
            "differences": [
                (place, first_difference(plain.tokens, ours.tokens))
                for place, plain, ours in pairs
                if plain.tokens != ours.tokens
            ],
            "log-probabilities": max(
                (
                    abs(plain.cumulative_logprob - ours.cumulative_logprob)
                    for _, plain, ours in pairs
                    if plain.logprobs is not None
                ),
                default=0.0,
            ),
            "tokens": sum(len(ours.tokens) for _, _, ours in pairs),
            "accepted": spy.accepted,
            "moved": spy.moved,
            "trees": trees,
            "drafts": engine.llm.collective_rpc("clover2_stats")[0],
            "times": times(engine) if scenario.widths else {},
            **counts,
        }


def times(engine: Any) -> dict[str, Any]:
    """What a worker has measured at start, and measures when asked."""
    rpc = engine.llm.collective_rpc
    return {
        "steps": rpc("clover2_step_milliseconds")[0],
        "parts": rpc("clover2_part_milliseconds")[0],
    }


def install_planter(scenario: Scenario, engine: Any, patch: Any) -> None:
    """Plant what plain vLLM said into the trees of this engine."""
    from planting import Planter

    planter = Planter(7, chain=scenario.tree.get("tree") == "chain")
    if scenario.runner == "V1":
        planter.install(patch)
    else:
        from planting_v2 import install

        install(planter, engine.runner, patch)


def force_widths(widths: tuple[int, ...], patch: Any) -> None:
    """Let a worker want these, whatever steps cost."""
    if widths:
        from vllm_clover2.tree.widths import WidthChooser

        stock, wanted = WidthChooser.choose, itertools.cycle(widths)

        def choose(chooser: Any, plain: Any) -> int:
            stock(chooser, plain)  # must not fail either
            return next(wanted)

        patch(WidthChooser, "choose", choose)


def run_aborting(engine: Any, requests: list[Any], aborted: int) -> list[Any]:
    """Run all requests, but abort some when they have begun; None for those."""
    if not aborted:
        return engine.run(requests)
    ids = [engine.add(request) for request in requests]
    outputs: dict[str, Any] = {}
    for _ in range(4):
        outputs |= engine.step()
    engine.abort(*ids[:aborted])
    while engine.busy:
        outputs |= engine.step()
    return [outputs.get(request_id) for request_id in ids]


@contextmanager
def model_runner(v2: bool) -> Iterator[None]:
    """What the user says of Model Runner V2."""
    from vllm import envs

    envs.disable_envs_cache()  # or the first engine's environment would stay
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    try:
        yield
    finally:
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)


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


def count_passes(engine: Any, counts: dict[str, Any], patch: Any) -> None:
    """The target's passes: requests, rows of each if equal, graph, its requests."""
    if (manager := getattr(engine.runner, "cudagraph_manager", None)) is None:
        return
    counts |= {"passes": [], "whole graphs": 0}
    stock, passes = manager.dispatch, counts["passes"]

    def dispatch(requests: int, rows: int, each: int | None, *args: Any, **kw: Any):
        size = stock(requests, rows, each, *args, **kw)
        passes.append([requests, each, size.cg_mode.name, size.num_reqs])
        return size

    patch(manager, "dispatch", dispatch)
    replay = _counting(manager.run_fullgraph, counts, "whole graphs")
    patch(manager, "run_fullgraph", replay)


def count_replays(engine: Any, counts: dict[str, Any], patch: Any) -> None:
    """Batch sizes of both parts of drafting, and which of them a graph was for."""
    speculator = getattr(engine.runner, "speculator", None)
    for part in ("augment_graphs", "growth_graphs"):
        if (graphs := getattr(speculator, part, None)) is None:
            continue
        sizes: list[Any] = []
        counts[part] = sizes
        for each in graphs.values() if isinstance(graphs, dict) else [graphs]:
            stock = each.size_for

            def size_for(
                batch: int, stock: Any = stock, sizes: list[Any] = sizes
            ) -> Any:
                size = stock(batch)
                sizes.append([batch, size and size.num_reqs])
                return size

            patch(each, "size_for", size_for)


def count_widths(engine: Any, counts: dict[str, Any], patch: Any) -> None:
    """How many nodes requests were to verify, step by step."""
    stock, counts["widths"] = engine.runner.execute_model, []

    def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        drafts = scheduled.scheduled_spec_decode_tokens
        widths = {len(drafts.get(name, ())) for name in scheduled.num_scheduled_tokens}
        counts["widths"].append(sorted(widths))
        return stock(scheduled, *args, **kwargs)

    patch(engine.runner, "execute_model", execute_model)


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
        count_passes(engine, counts, patch)
        count_replays(engine, counts, patch)
        count_widths(engine, counts, patch)
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
