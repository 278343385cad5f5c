# SPDX-License-Identifier: Apache-2.0
"""One pool of candidates from two sources: a draft head and the request's own text.

A candidate is a token below a parent with the probability that the text goes on that
way. The same token under the same parent is one candidate, whoever proposes it. All
compete by joint probability; where both sources know a parent, theirs are mixed.
"""

from typing import NamedTuple

import torch

from vllm_clover2.tree.context import ContextCandidates, ContextWalk, held_below
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees, Source, TopK

_LEAST_CREDIT = 1e-6
"""Keeps the credit of a context node finite where neither source expected it."""
_GRID = 2.0**-12
_LEAST_LOG = -60.0
"""Sums of 63 of these stay within the 24 bits of a float32."""


class Frontier(NamedTuple):
    """The nodes of a level that may be asked about next, F of each request."""

    # [B, F] int64 rows of the pool: 0 the root, 1..N context nodes, then the head's.
    rows: torch.Tensor
    tokens: torch.Tensor  # [B, F] int64; 0 where there is no node
    # [B, F] index of the row's parent in the level above, for its recurrent state.
    parents: torch.Tensor
    # [B, F] float32: what a head's children can add, the joint probability of the node
    # less what the context's children hold of it. 0 where there is no node.
    open: torch.Tensor


class CandidatePool:
    """All candidates for B requests.

    The context's are there from the start, in rows 1..N; the head's come level by
    level, in rows of their own unless the context has the same token below the same
    parent. Parents always stand in a lower row.
    """

    def __init__(self, context: ContextCandidates) -> None:
        self._context = context
        self._nodes = nodes = context.nodes
        self._parents = nodes.parents.long()
        self._held = held_below(context.beside, self._parents)  # [B, 1 + N]
        # Probability below the parent, and the log of the product along the path.
        self._below = context.alone
        self._credit = torch.full_like(context.beside, torch.nan)
        self._by_head = torch.zeros_like(nodes.valid)
        self._joint = self._new_joint()
        # The head's own: lists of [B, candidates of a level].
        self._head_tokens: list[torch.Tensor] = []
        self._head_parents: list[torch.Tensor] = []
        self._head_joint: list[torch.Tensor] = []
        self._level = 0

    @property
    def _num_context(self) -> int:
        return self._parents.shape[1]

    def _new_joint(self) -> torch.Tensor:
        """Log joint probabilities of the root and the context's rows, [B, 1 + N].

        Pointer jumping over the logs of what holds below each parent. They lie on a
        grid on which sums are exact in any order, or else a child could end up above
        its parent by a rounding error.
        """
        logs = (self._below.log() / _GRID).floor() * _GRID
        logs = torch.nn.functional.pad(logs.clamp(min=_LEAST_LOG), (1, 0))
        pointer = torch.nn.functional.pad(self._parents, (1, 0))
        for _ in range(max(1, int(self._num_context)).bit_length()):
            logs = logs + logs.gather(1, pointer)
            pointer = pointer.gather(1, pointer)
        return logs

    def roots(self) -> Frontier:
        """The level above all nodes."""
        requests = len(self._parents)
        zeros = self._parents.new_zeros((requests, 1))
        return Frontier(zeros, zeros, zeros, 1.0 - self._held[:, :1])

    def add(
        self,
        frontier: Frontier,
        children: TopK,  # [B, F, k] below each node of the frontier
        asked: torch.Tensor,  # [B, F] bool, whether the head was asked about the node
        width: int,  # nodes of the next frontier
    ) -> Frontier:
        """Take a head's children in; returns the likeliest nodes of their level."""
        self._level += 1
        rows = frontier.rows
        asked = asked & (frontier.open > 0.0)  # the frontier may be padded
        in_context = rows <= self._num_context
        row_or_root = rows.masked_fill(~in_context, 0)
        twin = self._twins(frontier, children)
        self._mix(row_or_root, asked & in_context, children, twin)

        held = self._held.gather(1, row_or_root).masked_fill(~in_context, 0.0)
        above = self._joint_of(rows) + torch.log1p(-held)
        joint = above[:, :, None] + children.values
        joint = joint.masked_fill(twin.any(-1) | ~asked[:, :, None], -torch.inf)
        self._head_tokens.append(children.tokens.flatten(1))
        self._head_parents.append(
            rows.repeat_interleave(children.tokens.shape[-1], dim=1)
        )
        self._head_joint.append(joint.flatten(1))
        return self._next_frontier(frontier, asked & in_context, width)

    def _twins(self, frontier: Frontier, children: TopK) -> torch.Tensor:
        """[B, F, k, N] bool, whether a child is the same node as the context's."""
        nodes = self._nodes
        same_parent = self._parents[:, None, :] == frontier.rows[:, :, None]
        same_parent &= nodes.valid[:, None, :]
        same_token = nodes.tokens[:, None, None, :] == children.tokens[..., None]
        return same_token & same_parent[:, :, None, :]

    def _mix(
        self,
        rows: torch.Tensor,  # [B, F] context rows (or the root) of the frontier
        asked: torch.Tensor,  # [B, F] bool
        children: TopK,
        twin: torch.Tensor,  # [B, F, k, N] bool
    ) -> None:
        """Mix both sources' probabilities below nodes that the head was asked about."""
        probs = children.values.exp()
        head = (probs[..., None] * twin).sum((1, 2))  # [B, N]
        asked_row = torch.zeros_like(self._held).scatter_add(1, rows, asked.float()) > 0
        mixed = asked_row.gather(1, self._parents) & self._nodes.valid
        beside = self._context.beside
        rest = (1.0 - self._held.gather(1, self._parents)) * head
        below = (beside + rest).clamp(max=1.0)
        self._below = torch.where(mixed, below, self._below)
        credit = beside / below.clamp(min=_LEAST_CREDIT)
        self._credit = torch.where(mixed, credit, self._credit)
        self._by_head |= twin.any(2).any(1)
        self._joint = self._new_joint()

    def _joint_of(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._joint, *self._head_joint], dim=1).gather(1, rows)

    def _next_frontier(
        self,
        frontier: Frontier,
        asked: torch.Tensor,  # [B, F] bool, context rows that the head was asked about
        width: int,
    ) -> Frontier:
        """The likeliest nodes of the level, of those whose parent has a state."""
        # Which place of the frontier a context row holds, -1: none.
        places = torch.full_like(self._held, -1, dtype=torch.int64)
        place = torch.arange(frontier.rows.shape[1], device=asked.device)
        rows = frontier.rows.masked_fill(~asked, 0)
        places = places.scatter_reduce(1, rows, torch.where(asked, place, -1), "amax")
        parent_place = places.gather(1, self._parents)
        here = (self._nodes.depths == self._level) & (parent_place >= 0)
        ours = self._joint[:, 1:].masked_fill(~here, -torch.inf)
        theirs = self._head_joint[-1]
        level = torch.cat([ours, theirs], dim=1)
        best, chosen = level.topk(min(width, level.shape[1]), dim=1)

        per_node = theirs.shape[1] // frontier.rows.shape[1]
        head_place = place.repeat_interleave(per_node).expand(len(ours), -1)
        head_rows = torch.arange(theirs.shape[1], device=asked.device)
        head_rows = (head_rows + self._first_row()).expand(len(ours), -1)
        own_rows = torch.arange(1, ours.shape[1] + 1, device=asked.device)
        rows = torch.cat([own_rows.expand(len(ours), -1), head_rows], 1)
        tokens = torch.cat([self._nodes.tokens, self._head_tokens[-1]], 1)
        held = torch.nn.functional.pad(self._held[:, 1:], (0, theirs.shape[1]))
        return Frontier(
            rows.gather(1, chosen),
            tokens.gather(1, chosen).clamp(min=0),
            torch.cat([parent_place, head_place], 1).gather(1, chosen).clamp(min=0),
            best.exp() * (1.0 - held.gather(1, chosen)),
        )

    def _first_row(self) -> int:
        """Row of the first candidate of the newest level."""
        older = sum(level.shape[1] for level in self._head_joint[:-1])
        return 1 + self._num_context + older

    def best(self, num_nodes: int) -> GrownTrees:
        """The ``num_nodes`` likeliest candidates of every request as trees.

        Order: falling joint probability, ties by row, so that parents come first and
        every prefix is the best tree of its size.
        """
        valid = self._nodes.valid
        joint = self._joint[:, 1:].masked_fill(~valid, -torch.inf)
        joint = torch.cat([joint, *self._head_joint], dim=1)
        tokens = torch.cat([self._nodes.tokens, *self._head_tokens], dim=1)
        parents = torch.cat([self._parents, *self._head_parents], dim=1)
        source = torch.where(self._by_head, Source.BOTH, Source.CONTEXT).to(torch.int8)
        source = torch.nn.functional.pad(
            source, (0, joint.shape[1] - source.shape[1]), value=Source.HEAD
        )
        joint, order = joint.sort(dim=1, descending=True, stable=True)
        row_of = torch.empty_like(order)
        rows = torch.arange(1, joint.shape[1] + 1, device=order.device)
        row_of.scatter_(1, order, rows.expand(len(order), -1))
        row_of = torch.nn.functional.pad(row_of, (1, 0))  # the root stays row 0

        joint, order = joint[:, :num_nodes], order[:, :num_nodes]
        kept = joint > -torch.inf
        parents = row_of.gather(1, parents.gather(1, order)).masked_fill(~kept, 0)
        tokens = tokens.gather(1, order).masked_fill(~kept, NO_TOKEN)
        depths = _depths(parents).masked_fill(~kept, 0)
        return GrownTrees(
            tokens,
            parents.int(),
            depths.int(),
            joint,
            kept.sum(1, dtype=torch.int32),
            source.gather(1, order),
        )

    def walk(self) -> ContextWalk:
        """What calibration needs to know once the text has gone on."""
        nodes = self._nodes
        return ContextWalk(
            nodes.tokens,
            nodes.parents,
            nodes.depths,
            self._context.cells,
            self._credit,
        )


def _depths(
    parents: torch.Tensor,  # [B, N] int64, row numbers
) -> torch.Tensor:
    """Depths [B, N] int64: each round doubles the levels that a node looks up."""
    depths = torch.nn.functional.pad(torch.ones_like(parents), (1, 0))
    pointer = torch.nn.functional.pad(parents, (1, 0))
    for _ in range(parents.shape[1].bit_length()):
        depths = depths + depths.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return depths[:, 1:]
