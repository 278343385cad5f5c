# SPDX-License-Identifier: Apache-2.0
"""Offline replay: what a head would accept on recorded greedy answers.

No engine runs.  The target's hidden states of a recorded answer come from one
forward pass; a tree grown at a position is verified against the tokens that the
target is known to have produced there.  For greedy answers this is what serving
does, step for step, up to rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import load_head
from vllm_clover2.ops import tree_accept
from vllm_clover2.train.config import EvaluateConfig
from vllm_clover2.train.data import (
    AnswerSet,
    Batch,
    collate,
    read_answers,
    token_budget_batches,
)
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.run import write_json
from vllm_clover2.tree import (
    DynamicTree,
    GrownTrees,
    TreeBatch,
    chain,
    grow_dynamic,
    grow_static,
    paper_tree,
)

__all__ = ["HeadDraft", "ReplayResult", "evaluate", "evaluate_head", "parse_tree"]

# Target token of a row whose true continuation is unknown or past the end.
_NO_TARGET = -2


class HeadDraft:
    """A plain Clover-2 model as the draft that trees are grown from."""

    def __init__(self, model: Clover2Model, lm_head: torch.Tensor) -> None:
        ids = model.draft_vocab_ids
        self._recurrent = model.recurrent
        self._embeddings = lm_head  # [V, H]
        self._output = lm_head if ids is None else lm_head[ids]  # [Vd, H]
        self._ids = ids

    def _log_probs(self, out: torch.Tensor) -> torch.Tensor:
        logits = out @ self._output.T
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)

    def first(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return hidden, self._log_probs(self._recurrent.first(hidden))

    def advance(
        self, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state, out = self._recurrent.advance(state, self._embeddings[tokens])
        return state, self._log_probs(out)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        return draft_ids if self._ids is None else self._ids[draft_ids]


Grow = Callable[[HeadDraft, torch.Tensor], GrownTrees]


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


@dataclass(frozen=True)
class _Recorded:
    """A batch of answers with everything a replay reads."""

    tokens: torch.Tensor  # [B, T] int64
    lengths: torch.Tensor  # [B] int64
    prompt_lens: torch.Tensor  # [B] int64
    states: torch.Tensor  # [B, T, H] the augmenting block's output


@torch.inference_mode()
def _record(
    model: Clover2Model, target: Target, answers: AnswerSet, batch: Batch
) -> _Recorded:
    device = target.lm_head.device
    tokens = batch.input_ids.to(device)
    hidden = target.pre_norm(tokens).to(model.norm.weight.dtype)
    next_ids = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    embeddings = target.lm_head[next_ids].to(hidden.dtype)
    return _Recorded(
        tokens,
        batch.lengths.to(device),
        torch.from_numpy(answers.prompt_lens[batch.indices]).to(device),
        model.augment(hidden, embeddings),
    )


@torch.inference_mode()
def _replay(
    draft: HeadDraft, recorded: _Recorded, grow: Grow, depth: int
) -> list[ReplayResult]:
    """Replay all answers of a batch in lockstep; one result per answer."""
    num_answers, length = recorded.tokens.shape
    device = recorded.tokens.device
    # Known tokens, and "no target" for everything past an answer's end.
    known = torch.full((num_answers, length + depth + 2), _NO_TARGET, device=device)
    valid = torch.arange(length, device=device) < recorded.lengths[:, None]
    known[:, :length] = recorded.tokens.where(valid, _NO_TARGET)
    steps = np.zeros(num_answers, dtype=np.int64)
    nodes = np.zeros(num_answers, dtype=np.int64)
    reached = np.zeros((num_answers, depth), dtype=np.int64)
    emitted = np.zeros(num_answers, dtype=np.int64)
    # The root: the last committed token.  The first one comes from the prefill.
    root = recorded.prompt_lens.clone()
    while True:
        active = (root < recorded.lengths - 1).nonzero()[:, 0]
        if not len(active):
            break
        grown = grow(draft, recorded.states[active, root[active] - 1])
        trees = TreeBatch.from_padded(grown.tokens, grown.parents, grown.sizes)
        owner = torch.repeat_interleave(active, trees.row_offsets.diff().long())
        after = known[owner, root[owner] + 1 + trees.depths.long()]
        _, accepted, _ = tree_accept(
            after, trees.tokens, trees.parents, trees.row_offsets, depth
        )
        rows = active.cpu().numpy()
        lengths = accepted.cpu().numpy()
        steps[rows] += 1
        nodes[rows] += grown.sizes.cpu().numpy()
        reached[rows] += np.arange(depth) < lengths[:, None]
        left = (recorded.lengths - 1 - root)[active].cpu().numpy()
        emitted[rows] += np.minimum(lengths + 1, left)
        root[active] += accepted.long() + 1
    return [
        ReplayResult(int(steps[i]), int(emitted[i]), reached[i], int(nodes[i]))
        for i in range(num_answers)
        if steps[i]
    ]


def evaluate_head(
    model: Clover2Model,
    target: Target,
    answers: AnswerSet,
    indices: np.ndarray,
    trees: Sequence[str],
    max_tokens: int = 16384,
) -> dict[str, dict[str, object]]:
    """Tokens per step and acceptance by depth of each tree, overall and by task."""
    grows = {name: parse_tree(name) for name in trees}
    draft = HeadDraft(model, target.lm_head.to(model.norm.weight.dtype))
    totals: dict[str, dict[str, ReplayResult]] = {name: {} for name in trees}
    for chosen in token_budget_batches(answers.lengths, indices, max_tokens, None):
        recorded = _record(model, target, answers, collate(answers, chosen))
        has_steps = recorded.prompt_lens < recorded.lengths - 1
        tasks = [
            answers.tasks[index]
            for index, kept in zip(chosen, has_steps.tolist(), strict=True)
            if kept
        ]
        for name, (grow, depth) in grows.items():
            results = _replay(draft, recorded, grow, depth)
            for task, result in zip(tasks, results, strict=True):
                for key in ("all", task):
                    before = totals[name].get(key)
                    totals[name][key] = before.merge(result) if before else result
    return {
        name: {
            **by_task["all"].summary(),
            "by_task": {
                task: result.summary()["tokens_per_step"]
                for task, result in sorted(by_task.items())
                if task != "all"
            },
        }
        for name, by_task in totals.items()
        if by_task
    }


def check_target(model: Clover2Model, target: Target) -> None:
    """Raise ValueError unless the head can draft for this target."""
    for key in ("hidden_size", "vocab_size"):
        ours, theirs = getattr(model.config, key), getattr(target.config, key)
        if ours != theirs:
            raise ValueError(
                f"the head's {key} must equal the target's {theirs}, found {ours}; "
                "use the head that was trained for this target"
            )


def evaluate(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """The `vllm-clover2 evaluate` command; the result is also written as JSON."""
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in config.trees:
        parse_tree(name)  # a wrong name must not cost the time to load a model
    model = load_head(config.head, dtype).to(device).eval()
    target = Target.load(config.target, dtype, device)
    check_target(model, target)
    answers = read_answers(
        config.answers, target.config.vocab_size, config.max_length, config.max_answers
    )
    result = evaluate_head(
        model,
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
