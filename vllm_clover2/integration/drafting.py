# SPDX-License-Identifier: Apache-2.0
"""What is drafted at the end of a step: for whom, from which sources, how much.

The steps, for all requests of a batch at once: note the committed rows, learn from
how the texts went on, look into each text for what it may repeat, decide whom to ask
the head for, write the draft's KV of those, grow, and cut the trees to what pays.
"""

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_clover2 import ops
from vllm_clover2.integration.backlog import CommittedRows, HiddenBacklog
from vllm_clover2.integration.drafter import Drafter
from vllm_clover2.integration.proposer import Clover2Proposer
from vllm_clover2.integration.stats import LEVELS, PREDICTED_RATIO, WorkerStats
from vllm_clover2.integration.step import of_first_rank
from vllm_clover2.tree.chooser import Chooser, Plan
from vllm_clover2.tree.context import ContextCandidates, ContextWalk
from vllm_clover2.tree.grower import Growth, TreeGrower
from vllm_clover2.tree.growth import Draft
from vllm_clover2.tree.step_cost import StepCost, Work
from vllm_clover2.tree.types import GrownTrees

_MAX_WAITING_ROWS = 8192
"""Rows without draft KV that are remembered: 9 MB for SmolLM2-135M in bfloat16."""


@dataclass(frozen=True)
class FinishedStep:
    """What a target pass left behind."""

    requests: list[str]  # [num_reqs] ids in batch order
    drafted: list[int]  # [B] batch indices of those that continue and may be drafted
    emitted: list[list[int]]  # [num_reqs] tokens that the step gave each
    token_ids: torch.Tensor  # [slots, width] int32 on the host, all texts
    lengths: np.ndarray  # [num_reqs] int32 tokens of each text
    committed: CommittedRows | None  # None: there is no head to write KV for
    block_table: np.ndarray  # [num_reqs, max_blocks] int32
    attention: Any  # CommonAttentionMetadata of the pass
    block_size: int  # tokens in one entry of the block tables
    work: Work  # what the pass did
    prompt_rows: int  # that are left for the next step


class _Known(NamedTuple):
    """What the text alone says of B requests, for the chooser."""

    open: np.ndarray  # [B] what it leaves a head below each root
    joint: np.ndarray  # [B, N] probabilities of its nodes, 0: none


class StepClock:
    """Seconds from the end of one step to the end of the next.

    Time in which the engine had nothing to do does not count: where the gap between
    two steps is long, that of other steps is taken instead.
    """

    _LONGEST_GAP = 0.02

    def __init__(self) -> None:
        self._begun = self._ended = time.perf_counter()
        self._gap = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self._begun

    def begin(self) -> None:
        self._begun = time.perf_counter()
        gap = self._begun - self._ended
        if gap < self._LONGEST_GAP:
            self._gap += 0.1 * (gap - self._gap)

    def end(self) -> float:
        self._ended = time.perf_counter()
        return self._ended - self._begun + self._gap


class Drafting:
    """Drafts for every step; keeps what has to be known from one to the next."""

    def __init__(self, drafter: Drafter, block_size: int, stats: WorkerStats) -> None:
        self.drafter = drafter
        # None: the text is the only source.
        self.head = drafter if isinstance(drafter, Clover2Proposer) else None
        self.grower = TreeGrower(drafter.options)
        self.clock = StepClock()
        self.stats = stats
        self.backlog = HiddenBacklog(_MAX_WAITING_ROWS, block_size, stats.counts)
        self.chooser: Chooser | None = None  # None: always as much as there is
        self._limits = drafter.options.context_limits()
        # The last step's context nodes: request -> (row, length of its text).
        self._walk: ContextWalk | None = None
        self._walk_rows: dict[str, tuple[int, int]] = {}
        self._expected: dict[str, float] = {}  # accepted tokens of the last drafts
        self.held_back = 0  # requests that the last step could have drafted for

    def adapt_to(self, cost: StepCost) -> None:
        """Let what is drafted follow from what steps cost."""
        self.chooser = Chooser(cost)

    def forget(self, request: str) -> None:
        """The request is gone."""
        self.backlog.drop(request)
        self._expected.pop(request, None)
        self._walk_rows.pop(request, None)
        if self.chooser is not None:
            self.chooser.forget(request)

    def draft(self, step: FinishedStep) -> GrownTrees:
        """Trees for ``step.drafted``, in that order."""
        if step.committed is not None:
            self.backlog.add(step.requests, step.committed, step.block_table)
        self._learn(step)
        self.held_back = 0
        if not step.drafted:
            return self._ended(step, Growth(_no_trees(0), None), 0)
        context = self._context(step)
        known = self._known(context, len(step.drafted))
        ids = [step.requests[i] for i in step.drafted]
        waiting = self._waiting(ids)
        next_work = Work(
            len(ids) + step.prompt_rows, step.prompt_rows, int(step.lengths.sum())
        )
        plan = self._plan(ids, known, waiting, next_work)
        growth, augmented = self._grow(step, context, plan)
        self._remember_walk(step, context, growth.walk)
        growth = growth._replace(
            trees=self._sized(ids, known, waiting, plan, growth, next_work)
        )
        return self._ended(step, growth, augmented)

    def _context(self, step: FinishedStep) -> ContextCandidates | None:
        if self._limits is None:
            return None
        nodes = ops.context_nodes(
            step.token_ids,
            torch.tensor(step.drafted, dtype=torch.int32),
            torch.from_numpy(step.lengths[step.drafted]),
            *self._limits,
        )
        return self.grower.calibration.judge(nodes)

    def _known(self, context: ContextCandidates | None, requests: int) -> _Known:
        if context is None or self.chooser is None:  # without one nobody asks
            return _Known(np.ones(requests), np.zeros((requests, 0)))
        return _Known(context.open().numpy(), context.joint.numpy())

    def _waiting(self, ids: list[str]) -> np.ndarray:
        """Rows without draft KV [B]; -1 where the head cannot be asked."""
        if self.head is None:
            return np.full(len(ids), -1)
        return self.backlog.sizes(ids)

    def _plan(
        self,
        ids: list[str],
        known: _Known,
        waiting: np.ndarray,
        work: Work,
    ) -> Plan:
        """The decision of tensor-parallel rank 0: ranks measure different times."""
        if self.chooser is None:
            return Plan(waiting >= 0, 0.0, 0.0, 0.0)
        plan = self.chooser.plan(ids, known.open, known.joint, waiting, work)
        group = get_tp_group()
        if group.world_size == 1:
            return plan
        packed = torch.tensor([*plan.ask, plan.least], dtype=torch.float64)
        packed = group.broadcast(packed.to(self.drafter.device)).cpu().numpy()
        return Plan(packed[:-1] > 0.0, float(packed[-1]), 0.0, 0.0)

    def _grow(
        self, step: FinishedStep, context: ContextCandidates | None, plan: Plan
    ) -> tuple[Growth, int]:
        """The trees, and for how many rows draft KV was written."""
        options = self.grower.options
        ask = torch.from_numpy(plan.ask).to(self.drafter.device)
        model, hidden, rows = self._asked(step, plan)
        limits = None
        if not options.has_fixed_shape:
            limits = options.dynamic_tree().without_nodes_below(plan.least)
            limits = dataclasses.replace(
                limits, min_expanded=plan.node_mass, min_level_mass=plan.level_mass
            )
        if context is not None:
            context = context.to(hidden.device)
        return self.grower.grow(model, hidden, context, ask, limits), rows

    def _asked(
        self, step: FinishedStep, plan: Plan
    ) -> tuple[Draft | None, torch.Tensor, int]:
        """The head, its states [B, H] at the roots, and rows that got draft KV.

        Without anybody to ask for: None, states of size 0, no rows.
        """
        asked = [i for i, ask in zip(step.drafted, plan.ask, strict=True) if ask]
        if self.head is None or not asked:
            nothing = torch.empty(len(step.drafted), 0, device=self.drafter.device)
            return None, nothing, 0
        head = self.head
        hidden = head.hidden_states.new_zeros(
            len(step.drafted), head.hidden_states.shape[1]
        )
        ids = [step.requests[i] for i in asked]
        committed = self.backlog.take(ids, asked, step.block_table)
        places = torch.from_numpy(np.flatnonzero(plan.ask)).to(hidden.device)
        hidden[places] = head.augment(committed, step.attention, step.block_size)
        return head.model, hidden, len(committed.positions)

    def _sized(
        self,
        ids: list[str],
        known: _Known,
        waiting: np.ndarray,
        plan: Plan,
        growth: Growth,
        work: Work,
    ) -> GrownTrees:
        """The trees, cut to what pays."""
        trees = growth.trees
        if self.chooser is not None:
            joint = trees.joint.exp().cpu().numpy()
            if plan.ask.any() and not self.grower.options.has_fixed_shape:
                self.chooser.learn_gain(
                    plan,
                    known.open,
                    known.joint,
                    joint,
                    work,
                    growth.levels,
                    growth.asked,
                )
            sizes = self.chooser.sizes(ids, joint, work)
            trees = trees._replace(sizes=torch.from_numpy(sizes).int())
            could = (joint > 0.0).any(axis=1) | (waiting >= 0) & ~plan.ask
            self.held_back = int((could & (sizes == 0)).sum())
            kept = np.arange(joint.shape[1]) < sizes[:, None]
            self._expected.update(zip(ids, (joint * kept).sum(axis=1).tolist()))
        return of_first_rank(trees)

    def _learn(self, step: FinishedStep) -> None:
        """Calibrate by how the texts of the last step went on."""
        if self.chooser is not None:
            for request, emitted in zip(step.requests, step.emitted, strict=True):
                if emitted and request in self._expected:
                    expected = self._expected.pop(request)
                    self.chooser.accepted(request, expected, len(emitted) - 1)
        walk, self._walk = self._walk, None
        if walk is None:
            return
        rows, told = [], []
        for request, emitted, length in zip(
            step.requests, step.emitted, step.lengths.tolist(), strict=True
        ):
            row, length_before = self._walk_rows.get(request, (-1, -1))
            if emitted and length_before == length - len(emitted):
                rows.append(row)
                told.append(torch.tensor(emitted))
        if rows:
            known = torch.nn.utils.rnn.pad_sequence(told, True, padding_value=-1)
            self.grower.calibration.observe(
                ContextWalk(*(part[rows] for part in walk)), known
            )

    def _remember_walk(
        self,
        step: FinishedStep,
        context: ContextCandidates | None,  # on the host
        walk: ContextWalk | None,
    ) -> None:
        if walk is None or context is None:
            return
        nodes = context.nodes
        self._walk = ContextWalk(
            nodes.tokens, nodes.parents, nodes.depths, context.cells, walk.credit.cpu()
        )
        lengths = step.lengths[step.drafted].tolist()
        self._walk_rows = {
            step.requests[i]: (row, length)
            for row, (i, length) in enumerate(zip(step.drafted, lengths, strict=True))
        }

    def _ended(self, step: FinishedStep, growth: Growth, augmented: int) -> GrownTrees:
        """Learn what the step took."""
        self.stats.counts[LEVELS] += growth.levels
        if self.chooser is not None:
            work = dataclasses.replace(
                step.work,
                augmented=augmented,
                levels=growth.levels,
                grown=growth.asked,
            )
            seconds = self.clock.end()
            predicted = self.chooser.cost.observe(work, seconds)
            tokens = sum(map(len, step.emitted))
            self.chooser.earned(len(step.requests), tokens, work, seconds)
            self.stats.observe(PREDICTED_RATIO, predicted / seconds)
        return growth.trees


def _no_trees(requests: int) -> GrownTrees:
    return GrownTrees.empty(requests, torch.device("cpu"))
