# SPDX-License-Identifier: Apache-2.0
"""Candidates from the request's own text, and how far to trust them.

Much of what a model writes it has written or read before in the same request. The op
``context_nodes`` finds where the text's last tokens occurred earlier and returns what
followed there, as a small trie. How likely such a node is depends on how much text
matches and on how many of the places agree; both are looked up in a table of what
happened to nodes of the same kind.
"""

import math
from typing import NamedTuple

import torch

from vllm_clover2 import ops
from vllm_clover2.tree.context_priors import PRIOR_ALONE, PRIOR_BESIDE
from vllm_clover2.tree.types import ContextNodes


class ContextLimits(NamedTuple):
    """What of its own text a request is offered as candidates."""

    min_match: int = 1  # tokens that must agree
    max_match: int = 16  # tokens that are compared
    max_places: int = 32  # occurrences looked at: the longest matches, newest first
    max_depth: int = 16  # levels; a match of m tokens is followed for at most 2 m
    max_nodes: int = 64


class ContextCandidates(NamedTuple):
    """Context nodes with what each is worth below its parent."""

    nodes: ContextNodes
    cells: torch.Tensor  # [B, N] int64, the kind of each node
    # [B, N] float32: its probability when nobody else is asked.
    alone: torch.Tensor
    # [B, N] float32: its weight w in the mixture with a head's probabilities q for the
    # same parent, p(token) = w(token) + (1 - the siblings' sum of w) * q(token).
    beside: torch.Tensor
    # [B, N] float32: joint probability of its path when nobody else is asked.
    joint: torch.Tensor

    @classmethod
    def none(cls, requests: int, device: torch.device) -> "ContextCandidates":
        """No candidates for so many requests."""
        tokens = torch.empty((requests, 0), dtype=torch.int64, device=device)
        rows = tokens.int()
        sizes = torch.zeros(requests, dtype=torch.int32, device=device)
        nodes = ContextNodes(tokens, rows, rows, rows, rows, sizes)
        nothing = tokens.float()
        return cls(nodes, tokens, nothing, nothing, nothing)

    def to(self, device: torch.device) -> "ContextCandidates":
        """The candidates on ``device``, but for ``joint``, which grows no trees."""
        if self.cells.device == device:
            return self
        nodes = ContextNodes(*(x.to(device, non_blocking=True) for x in self.nodes))
        cells, alone, beside = (x.to(device, non_blocking=True) for x in self[1:4])
        return ContextCandidates(nodes, cells, alone, beside, self.joint)

    def open(self) -> torch.Tensor:
        """What the context leaves a head below each root [B]."""
        first = self.nodes.depths == 1
        return 1.0 - (self.beside * first).sum(dim=1)


class ContextWalk(NamedTuple):
    """Tries kept until it is known how the text went on; what calibration learns from.

    Rows as in :class:`ContextNodes`.
    """

    tokens: torch.Tensor  # [B, N] int64
    parents: torch.Tensor  # [B, N] int32
    depths: torch.Tensor  # [B, N] int32
    cells: torch.Tensor  # [B, N] int64, see ``Calibration``
    # [B, N] float32: the context's share in the mixture's probability of this token,
    # NaN where the head was not asked.
    credit: torch.Tensor


# A cell is a kind of node. Upper bounds (exclusive) of its four properties:
_MATCH_BOUNDS = (2, 3, 4, 5, 7, 10, 16)  # tokens that agree up to the node's parent
_SHARE_BOUNDS = (0.2, 0.45, 0.75, 1.0)  # of the siblings' places
_PLACES_BOUNDS = (2, 3)
_SHAPE = (
    len(_MATCH_BOUNDS) + 1,
    len(_SHARE_BOUNDS) + 1,
    len(_PLACES_BOUNDS) + 1,
    2,  # whether a sibling has a longer match
)

_CELLS = math.prod(_SHAPE)

_PRIOR_TRIALS = 50.0
"""How many observations the shipped table counts for."""
_MAX_TRIALS = 2000.0
"""Older observations fade once a cell has as many."""
_MAX_SUM = 0.98
"""Siblings never hold more together: something else is always possible."""


class Calibration:
    """Probabilities of context nodes by kind, learned from how texts went on.

    Of every kind it counts the nodes whose parent became text, those that became text
    themselves, and how much of that the context explains where the head was asked too:
    the estimate of mixture weights by expectation maximisation (Jelinek and Mercer,
    1980). The table has 240 cells and starts from shipped counts.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # Rows: trials, hits; trials beside the head, credit. The rows of a pair fade
        # together.
        ones = (1.0,) * _CELLS
        self._counts = _PRIOR_TRIALS * torch.stack(
            [
                torch.tensor(shares, dtype=torch.float64, device=device)
                for shares in (ones, PRIOR_ALONE, ones, PRIOR_BESIDE)
            ]
        )
        self._bounds = [
            torch.tensor(bounds, dtype=torch.float32, device=device)
            for bounds in (_MATCH_BOUNDS, _SHARE_BOUNDS, _PLACES_BOUNDS)
        ]
        # What follows from the counts: alone, and beside a head. It stays where it is:
        # CUDA graphs read it.
        self._values = (self._counts[1::2] / self._counts[::2]).float()

    def judge(self, nodes: ContextNodes) -> ContextCandidates:
        """The nodes with what they are worth."""
        worth = ops.judge_context(
            nodes.parents,
            nodes.depths,
            nodes.matches,
            nodes.places,
            self._bounds,
            self._values,
            _MAX_SUM,
        )
        return ContextCandidates(nodes, *worth)

    def observe(
        self,
        walk: ContextWalk,
        emitted: torch.Tensor,  # [B, T] int64, what followed the root, -1 padded
    ) -> None:
        """Learn from how the texts went on."""
        ops.learn_context(
            self._counts,
            self._values,
            walk.tokens,
            walk.parents,
            walk.depths,
            walk.cells,
            walk.credit,
            emitted,
            _MAX_TRIALS,
        )
