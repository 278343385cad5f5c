# SPDX-License-Identifier: Apache-2.0
"""One pool of candidates from two sources: a draft head and the request's own text.

A candidate is a token below a parent with the probability that the text goes on that
way. The same token under the same parent is one candidate, whoever proposes it. All
compete by joint probability; where both sources know a parent, theirs are mixed.
"""

from typing import NamedTuple

import torch

from vllm_clover2 import ops
from vllm_clover2.tree.context import ContextCandidates, ContextWalk
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees, Source, TopK


class Frontier(NamedTuple):
    """The nodes of a level that may be asked about next, F of each request."""

    # [B, F] int64 rows of the pool: 0 the root, 1..N context nodes, then the head's.
    rows: torch.Tensor
    tokens: torch.Tensor  # [B, F] int64; 0 where there is no node
    # [B, F] int64: which of the nodes that were asked about above is the parent.
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

    def __init__(
        self,
        context: ContextCandidates,
        room: int = 0,  # for a head's candidates
    ) -> None:
        nodes = context.nodes
        self._context = context
        self._num_context = nodes.tokens.shape[1]
        requests, self._end = len(nodes.tokens), 1 + self._num_context
        shape = requests, self._end + room
        self._tokens = nodes.tokens.new_full(shape, NO_TOKEN)
        self._tokens[:, 1 : self._end] = nodes.tokens
        self._parents = nodes.tokens.new_zeros(shape)
        self._parents[:, 1 : self._end] = nodes.parents
        # Log of the product along the path; the context's follow from `_below`.
        self._joint = context.alone.new_full(shape, -torch.inf)
        self._joint[:, 0] = 0.0
        # The context's probabilities below their parents.
        self._below = context.alone.clone()
        self._credit = torch.full_like(context.beside, torch.nan)
        self._by_head = torch.zeros_like(nodes.valid)
        self._level = 0

    def roots(self) -> Frontier:
        """The level above all nodes."""
        zeros = self._parents[:, :1]
        each = torch.arange(len(zeros), device=zeros.device)[:, None]
        return Frontier(zeros, zeros, each, self._context.open()[:, None])

    def add(
        self,
        frontier: Frontier,
        children: TopK,  # [A, k] below the nodes that the head was asked about
        asked: torch.Tensor,  # [A] int64 places of these in the flat frontier
        width: int,  # nodes of the next frontier
    ) -> Frontier:
        """Take a head's children in; returns the likeliest nodes of their level."""
        self._level += 1
        added = ops.add_candidates(
            self._tokens,
            self._parents,
            self._joint,
            self._below,
            self._credit,
            self._by_head,
            self._context.nodes.depths,
            self._context.beside,
            self._end,
            self._level,
            frontier.rows,
            frontier.open,
            asked,
            children.values,
            children.tokens,
            width,
        )
        self._end += frontier.rows.shape[1] * children.tokens.shape[1]
        return Frontier(*added)

    def best(self, num_nodes: int) -> GrownTrees:
        """The ``num_nodes`` likeliest candidates of every request as trees.

        Order: falling joint probability, ties by row, so that parents come first and
        every prefix is the best tree of its size.
        """
        rows, parents, depths, joint, sizes = ops.best_candidates(
            self._parents[:, : self._end],
            self._joint[:, : self._end],
            self._below,
            self._context.nodes.depths,
            num_nodes,
        )
        by_text = torch.where(self._by_head, Source.BOTH, Source.CONTEXT)
        of_row = torch.nn.functional.pad(
            by_text.to(torch.int8),
            (1, self._end - 1 - self._num_context),
            value=Source.HEAD,
        )
        return GrownTrees(
            self._tokens.gather(1, rows),
            parents,
            depths,
            joint,
            sizes,
            of_row.gather(1, rows),
        )

    def walk(self) -> ContextWalk:
        """What calibration needs to know once the text has gone on."""
        nodes = self._context.nodes
        return ContextWalk(
            nodes.tokens,
            nodes.parents,
            nodes.depths,
            self._context.cells,
            self._credit,
        )
