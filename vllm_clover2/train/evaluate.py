# SPDX-License-Identifier: Apache-2.0
"""Offline replay: what a head would accept on recorded greedy answers.

No engine runs.  The target's hidden states of a recorded answer come from one
forward pass; a tree grown at a position is verified against the tokens that the
target is known to have produced there.  For greedy answers this is what serving
does, step for step, up to rounding.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch.nn.utils.rnn import pad_sequence

from vllm_clover2.ops import context_nodes, tree_accept
from vllm_clover2.records import write_json
from vllm_clover2.train.architectures import Architecture, Replay, load_draft
from vllm_clover2.train.config import EvaluateConfig
from vllm_clover2.train.data import (
    AnswerSet,
    Batch,
    pack,
    read_answers,
    token_budget_batches,
)
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.reliability import Reliability, draw
from vllm_clover2.tree import GrownTrees, TreeBatch, TreeGrower, TreeOptions

__all__ = [
    "Lockstep",
    "ReplayResult",
    "ReplayStep",
    "evaluate",
    "evaluate_head",
    "parse_tree",
    "summarise",
]

# Target token of a row whose true continuation is unknown or past the end.
_NO_TARGET = -2

CONTEXT = "+context"
"""Suffix of the name of a tree that the request's own text is a source of."""


def parse_tree(name: str) -> TreeOptions:
    """The options of `chain:DEPTH`, `paper`, `dynamic:NODES[:DEPTH]`.

    With the suffix `+context` the request's own text is a source too (not for `paper`,
    whose shape is fixed). Trees have their full size, whatever a step costs.

    Raises ValueError if there is no such tree.
    """
    kind, *numbers = name.removesuffix(CONTEXT).split(":")
    options: dict[str, Any] = {"adaptive": False, "context": name.endswith(CONTEXT)}
    names = {
        "chain": ["num_speculative_tokens"],
        "paper": [],
        "dynamic": ["num_speculative_tokens", "depth"],
    }.get(kind, [])
    required = len(names[:1])
    if (
        kind not in ("chain", "paper", "dynamic")
        or not required <= len(numbers) <= len(names)
        or not all(number.isdecimal() for number in numbers)
        or (kind == "paper" and options["context"])
    ):
        raise ValueError(
            "a tree is chain:DEPTH[+context], paper, or "
            f"dynamic:NODES[:DEPTH][+context], found {name!r}"
        )
    options |= zip(names, map(int, numbers), strict=False)
    try:
        return TreeOptions(tree="static" if kind == "paper" else kind, **options)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ValueError(
            f"tree {name!r} is not valid: {where + ': ' if where else ''}"
            f"{problem['msg']}"
        ) from error


# An answer loops if this many tokens at its end repeat with a period of at most half.
_LOOP_TOKENS = 64


def loops(answer: np.ndarray) -> bool:
    """Whether an answer [n] ends in a loop, which greedy small models often do."""
    end = answer[-_LOOP_TOKENS:]
    periods = range(1, _LOOP_TOKENS // 2 + 1)
    return len(end) == _LOOP_TOKENS and any(
        np.array_equal(end[p:], end[:-p]) for p in periods
    )


@dataclass
class ReplayResult:
    """Counts over all steps of all replayed answers."""

    steps: int
    emitted: int  # tokens, the target's own one per step included
    reached: np.ndarray  # [depth] steps that accepted at least 1, 2, ... nodes
    nodes: int  # drafted in all steps

    def merge(self, other: "ReplayResult") -> "ReplayResult":
        return ReplayResult(
            self.steps + other.steps,
            self.emitted + other.emitted,
            self.reached + other.reached,
            self.nodes + other.nodes,
        )

    def summary(self) -> dict[str, object]:
        by_depth = self.reached / self.steps
        return {
            "tokens_per_step": round(self.emitted / self.steps, 4),
            "accepted_per_step": round(float(by_depth.sum()), 4),
            "acceptance_by_depth": [round(float(share), 4) for share in by_depth],
            "nodes_per_step": round(self.nodes / self.steps, 2),
            "steps": self.steps,
        }


def _total(results: Iterable[ReplayResult]) -> ReplayResult | None:
    """All results as one, leaving out answers without a step."""
    total: ReplayResult | None = None
    for result in results:
        # A single token, which the prefill gave, takes no step.
        if result.steps:
            total = total.merge(result) if total else result
    return total


def summarise(results: Iterable[tuple[str, ReplayResult]]) -> dict[str, object]:
    """(task, result) of every answer -> the figures of one tree."""
    results = list(results)
    overall = _total(result for _, result in results)
    if overall is None:
        raise ValueError(
            "an answer must have two tokens or more for a step to be counted, found "
            "none; give longer recorded answers"
        )
    by_task = {}
    for task in sorted({task for task, _ in results}):
        total = _total(result for of, result in results if of == task)
        if total is not None:
            by_task[task] = total.summary()["tokens_per_step"]
    return {**overall.summary(), "by_task": by_task}


class ReplayStep(NamedTuple):
    """One step of the A answers of a batch that are not at their end."""

    answers: torch.Tensor  # [A] int64, numbers in the batch
    roots: torch.Tensor  # [A] int64, positions of the trees' roots
    grown: GrownTrees
    trees: TreeBatch  # the same trees, as they are verified
    paths: torch.Tensor  # [A, depth] int32 accepted rows, -1 padded
    accepted: torch.Tensor  # [A] int32 nodes


class Lockstep:
    """All answers of a batch, replayed together a step at a time."""

    def __init__(self, batch: Batch, prompt_lens: torch.Tensor, depth: int) -> None:
        device = prompt_lens.device
        self.depth = depth
        self._lengths = torch.tensor(batch.lengths, device=device)
        # Known tokens, and "no target" for everything past an answer's end.
        tokens = batch.input_ids.to(device).split(batch.lengths)
        known = pad_sequence(tokens, batch_first=True, padding_value=_NO_TARGET)
        self._known = torch.nn.functional.pad(known, (0, depth + 2), value=_NO_TARGET)
        self._history = self._known.int()
        # The root: the last committed token.  The first one comes from the prefill.
        self._root = prompt_lens.clone()
        count = len(batch.lengths)
        self._steps, self._nodes, self._emitted = np.zeros((3, count), dtype=np.int64)
        self._reached = np.zeros((count, depth), dtype=np.int64)

    def run(
        self, drafts: Replay, grower: TreeGrower, reliability: Reliability
    ) -> list[ReplayResult]:
        """One result per answer."""
        for step in self.steps(drafts, grower):
            self._count(step)
            _judge(step.grown, step.paths, reliability)
        return [
            ReplayResult(*map(int, counts), reached=reached, nodes=int(nodes))
            for *counts, nodes, reached in zip(
                self._steps, self._emitted, self._nodes, self._reached
            )
        ]

    @torch.inference_mode()
    def steps(self, drafts: Replay, grower: TreeGrower) -> Iterator[ReplayStep]:
        """Grow trees and accept what the answers go on with, up to their ends."""
        limits = grower.options.context_limits()
        while len(active := (self._root < self._lengths - 1).nonzero()[:, 0]):
            context = None
            if limits is not None:
                lengths = self._root[active].int() + 1
                nodes = context_nodes(self._history, active.int(), lengths, *limits)
                context = grower.calibration.judge(nodes)
            root = self._root[active]
            grown, walk, *_ = grower.grow(*drafts.at(active, root), context)
            trees = TreeBatch.from_padded(grown.tokens, grown.parents, grown.sizes)
            paths, accepted = self._accept(active, trees)
            if walk is not None:
                ahead = torch.arange(1, paths.shape[1] + 2, device=root.device)
                emitted = self._known[active[:, None], root[:, None] + ahead]
                beyond = ahead > accepted[:, None] + 1
                grower.calibration.observe(walk, emitted.masked_fill(beyond, -1))
            yield ReplayStep(active, root, grown, trees, paths, accepted)
            self._root[active] += accepted.long() + 1

    def _accept(
        self, active: torch.Tensor, trees: TreeBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The paths that the answers go on with, and their lengths."""
        owner = torch.repeat_interleave(active, trees.row_offsets.diff().long())
        after = self._known[owner, self._root[owner] + 1 + trees.depths.long()]
        paths, accepted, _ = tree_accept(
            after, trees.tokens, trees.parents, trees.row_offsets, self.depth
        )
        return paths, accepted

    def _count(self, step: ReplayStep) -> None:
        rows = step.answers.cpu().numpy()
        taken = step.accepted.cpu().numpy()
        self._steps[rows] += 1
        self._nodes[rows] += step.grown.sizes.cpu().numpy()
        self._reached[rows] += np.arange(self.depth) < taken[:, None]
        left = (self._lengths[step.answers] - 1 - step.roots).cpu().numpy()
        self._emitted[rows] += np.minimum(taken + 1, left)


def _judge(
    grown: GrownTrees,
    paths: torch.Tensor,  # [B, depth] int32 accepted rows, -1 padded
    reliability: Reliability,
) -> None:
    """Count the nodes by what was predicted of them and what became of them."""
    rows = torch.arange(grown.tokens.shape[1], device=paths.device)
    drafted = rows < grown.sizes[:, None]
    accepted = torch.zeros_like(torch.nn.functional.pad(drafted, (1, 0)))
    accepted.scatter_(1, paths.long().clamp(min=0), True)
    reliability.add(
        grown.joint[drafted].exp().cpu().numpy(),
        grown.sources[drafted].cpu().numpy(),
        accepted[:, 1:][drafted].cpu().numpy(),
    )


@torch.inference_mode()
def evaluate_head(
    model: Any,
    architecture: Architecture,
    target: Target,
    answers: AnswerSet,
    indices: np.ndarray,
    trees: Sequence[str],
    max_tokens: int = 16384,
) -> dict[str, dict[str, object]]:
    """The figures of each tree: overall, by task, by source, without looping answers.

    `loop_free` leaves out answers whose last 64 tokens repeat with a period of at most
    32: their text is easy for context nodes, and nobody wants it.
    """
    options = {name: parse_tree(name) for name in trees}
    device = target.lm_head.device
    growers = {name: TreeGrower(one) for name, one in options.items()}
    judged = {name: Reliability() for name in trees}
    results: dict[str, list[tuple[str, ReplayResult]]] = {name: [] for name in trees}
    in_loop: list[bool] = []
    for chosen in token_budget_batches(answers.lengths, indices, max_tokens, None):
        batch = pack(answers, chosen)
        drafts = architecture.replay(model, target, target.states(batch), batch)
        prompt_lens = torch.from_numpy(answers.prompt_lens[chosen]).to(device)
        tasks = [answers.tasks[index] for index in chosen]
        in_loop += [
            loops(answers.answer(index)[answers.prompt_lens[index] :])
            for index in chosen
        ]
        for name, grower in growers.items():
            steps = Lockstep(batch, prompt_lens, options[name].max_depth)
            replayed = steps.run(drafts, grower, judged[name])
            results[name].extend(zip(tasks, replayed, strict=True))
    return {name: _report(results[name], in_loop, judged[name]) for name in results}


def _report(
    results: list[tuple[str, ReplayResult]],
    in_loop: list[bool],
    reliability: Reliability,
) -> dict[str, object]:
    report = summarise(results)
    loop_free = [one for one, looping in zip(results, in_loop) if not looping]
    total = _total(result for _, result in loop_free)
    report["loop_free"] = total and {"answers": len(loop_free), **total.summary()}
    report["sources"] = reliability.summary()
    return report


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """The `vllm-clover2 evaluate` command; the result is also written as JSON.

    Beside the JSON file a plot with its name shows predicted against accepted.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in config.trees:
        parse_tree(name)  # a wrong name must not cost the time to load a model
    target = Target.load(config.target, dtype, device)
    model, architecture = load_draft(config.head, dtype, target)
    answers = read_answers(
        config.answers, target.config.vocab_size, config.max_length, config.max_answers
    )
    result = evaluate_head(
        model,
        architecture,
        target,
        answers,
        np.arange(len(answers)),
        config.trees,
        config.max_tokens,
    )
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.output, result)
        sources = {name: one["sources"] for name, one in result.items()}
        draw(sources, config.output.with_suffix(".png"))
    return result
