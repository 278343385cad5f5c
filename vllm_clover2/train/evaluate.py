# SPDX-License-Identifier: Apache-2.0
"""Offline replay: what a head would accept on recorded greedy answers.

No engine runs.  The target's hidden states of a recorded answer come from one
forward pass; a tree grown at a position is verified against the tokens that the
target is known to have produced there.  For greedy answers this is what serving
does, step for step, up to rounding.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from vllm_clover2.ops import tree_accept
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
from vllm_clover2.tree import (
    DynamicTree,
    GrownTrees,
    TreeBatch,
    chain,
    grow_dynamic,
    grow_static,
    paper_tree,
)
from vllm_clover2.tree.growth import Draft

__all__ = ["ReplayResult", "evaluate", "evaluate_head", "parse_tree", "summarise"]

# Target token of a row whose true continuation is unknown or past the end.
_NO_TARGET = -2


Grow = Callable[[Draft, torch.Tensor], GrownTrees]


def parse_tree(name: str) -> tuple[Grow, int]:
    """How `chain:DEPTH`, `paper` or `dynamic:NODES[:DEPTH]` grows, and its depth."""
    kind, *numbers = name.split(":")
    try:
        values = [int(number) for number in numbers]
        if kind == "chain" and len(values) == 1:
            shape = chain(values[0])
            return partial(grow_static, shape=shape), shape.depth
        if kind == "paper" and not values:
            return partial(grow_static, shape=paper_tree()), paper_tree().depth
        if kind == "dynamic" and len(values) in (1, 2):
            tree = DynamicTree(values[0], depth=values[1] if len(values) > 1 else 5)
            return partial(grow_dynamic, tree=tree), tree.depth
    except ValueError as error:
        raise ValueError(f"tree {name!r} is not valid: {error}") from error
    raise ValueError(
        f"a tree is chain:DEPTH, paper or dynamic:NODES[:DEPTH], found {name!r}"
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
        return {
            "tokens_per_step": round(self.emitted / self.steps, 4),
            "accepted_per_step": round(float(self.reached.sum()) / self.steps, 4),
            "acceptance_by_depth": [
                round(float(share), 4) for share in self.reached / self.steps
            ],
            "nodes_per_step": round(self.nodes / self.steps, 2),
            "steps": self.steps,
        }


def summarise(results: Iterable[tuple[str, ReplayResult]]) -> dict[str, object]:
    """(task, result) of every answer -> the figures of one tree."""
    totals: dict[str, ReplayResult] = {}
    overall: ReplayResult | None = None
    for task, result in results:
        if not result.steps:
            continue  # a single token, which the prefill gave
        totals[task] = totals[task].merge(result) if task in totals else result
        overall = overall.merge(result) if overall else result
    if overall is None:
        raise ValueError(
            "an answer must have two tokens or more for a step to be counted, found "
            "none; give longer recorded answers"
        )
    by_task = {
        task: result.summary()["tokens_per_step"]
        for task, result in sorted(totals.items())
    }
    return {**overall.summary(), "by_task": by_task}


@torch.inference_mode()
def _replay(
    batch: Batch,
    prompt_lens: torch.Tensor,  # [B] int64
    drafts: Replay,
    grow: Grow,
    depth: int,
) -> list[ReplayResult]:
    """Replay all answers of a batch in lockstep; one result per answer."""
    device = prompt_lens.device
    num_answers = len(batch.lengths)
    lengths = torch.tensor(batch.lengths, device=device)
    # Known tokens, and "no target" for everything past an answer's end.
    tokens = batch.input_ids.to(device).split(batch.lengths)
    known = pad_sequence(tokens, batch_first=True, padding_value=_NO_TARGET)
    known = torch.nn.functional.pad(known, (0, depth + 2), value=_NO_TARGET)
    steps = np.zeros(num_answers, dtype=np.int64)
    nodes = np.zeros(num_answers, dtype=np.int64)
    reached = np.zeros((num_answers, depth), dtype=np.int64)
    emitted = np.zeros(num_answers, dtype=np.int64)
    # The root: the last committed token.  The first one comes from the prefill.
    root = prompt_lens.clone()
    while True:
        active = (root < lengths - 1).nonzero()[:, 0]
        if not len(active):
            break
        grown = grow(*drafts.at(active, root[active]))
        trees = TreeBatch.from_padded(grown.tokens, grown.parents, grown.sizes)
        owner = torch.repeat_interleave(active, trees.row_offsets.diff().long())
        after = known[owner, root[owner] + 1 + trees.depths.long()]
        _, accepted, _ = tree_accept(
            after, trees.tokens, trees.parents, trees.row_offsets, depth
        )
        rows = active.cpu().numpy()
        taken = accepted.cpu().numpy()
        steps[rows] += 1
        nodes[rows] += grown.sizes.cpu().numpy()
        reached[rows] += np.arange(depth) < taken[:, None]
        left = (lengths - 1 - root)[active].cpu().numpy()
        emitted[rows] += np.minimum(taken + 1, left)
        root[active] += accepted.long() + 1
    return [
        ReplayResult(int(steps[i]), int(emitted[i]), reached[i], int(nodes[i]))
        for i in range(num_answers)
    ]


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
    """Tokens per step and acceptance by depth of each tree, overall and by task."""
    grows = {name: parse_tree(name) for name in trees}
    results: dict[str, list[tuple[str, ReplayResult]]] = {name: [] for name in trees}
    for chosen in token_budget_batches(answers.lengths, indices, max_tokens, None):
        batch = pack(answers, chosen)
        drafts = architecture.replay(model, target, target.states(batch), batch)
        prompt_lens = torch.from_numpy(answers.prompt_lens[chosen])
        prompt_lens = prompt_lens.to(target.lm_head.device)
        tasks = [answers.tasks[index] for index in chosen]
        for name, (grow, depth) in grows.items():
            replayed = _replay(batch, prompt_lens, drafts, grow, depth)
            results[name].extend(zip(tasks, replayed, strict=True))
    return {name: summarise(found) for name, found in results.items()}


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """The `vllm-clover2 evaluate` command; the result is also written as JSON."""
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
    return result
