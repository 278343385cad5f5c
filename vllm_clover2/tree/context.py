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

from vllm_clover2.tree.context_priors import PRIOR_ALONE, PRIOR_BESIDE


class ContextLimits(NamedTuple):
    """What of its own text a request is offered as candidates."""

    min_match: int = 1  # tokens that must agree
    max_match: int = 16  # tokens that are compared
    max_places: int = 32  # occurrences looked at: the longest matches, newest first
    max_depth: int = 16  # levels; a match of m tokens is followed for at most 2 m
    max_nodes: int = 64


class ContextNodes(NamedTuple):
    """Continuations of earlier occurrences, B tries padded to N nodes.

    As ``ops.context_nodes`` returns them: node i is row i + 1, row 0 is the root,
    parents come first, and of siblings the one with the longest match.
    """

    tokens: torch.Tensor  # [B, N] int64, -1 padded
    parents: torch.Tensor  # [B, N] int32, row numbers
    depths: torch.Tensor  # [B, N] int32, from 1; padding 0
    matches: torch.Tensor  # [B, N] int32, tokens up to the root that agree
    places: torch.Tensor  # [B, N] int32, occurrences that go on through the node
    sizes: torch.Tensor  # [B] int32

    @property
    def valid(self) -> torch.Tensor:
        """[B, N] bool, not padding."""
        return self.depths > 0


class ContextCandidates(NamedTuple):
    """Context nodes with what each is worth below its parent."""

    nodes: ContextNodes
    cells: torch.Tensor  # [B, N] int64, the kind of each node
    # [B, N] float32: its probability when nobody else is asked.
    alone: torch.Tensor
    # [B, N] float32: its weight w in the mixture with a head's probabilities q for the
    # same parent, p(token) = w(token) + (1 - the siblings' sum of w) * q(token).
    beside: torch.Tensor

    @classmethod
    def none(cls, requests: int, device: torch.device) -> "ContextCandidates":
        """No candidates for so many requests."""
        tokens = torch.empty((requests, 0), dtype=torch.int64, device=device)
        rows = tokens.int()
        sizes = torch.zeros(requests, dtype=torch.int32, device=device)
        nodes = ContextNodes(tokens, rows, rows, rows, rows, sizes)
        return cls(nodes, tokens, tokens.float(), tokens.float())

    def to(self, device: torch.device) -> "ContextCandidates":
        """The candidates on ``device``."""
        if self.cells.device == device:
            return self
        nodes = ContextNodes(*(x.to(device, non_blocking=True) for x in self.nodes))
        return ContextCandidates(
            nodes, *(x.to(device, non_blocking=True) for x in self[1:])
        )

    def open(self) -> torch.Tensor:
        """What the context leaves a head below each root [B]."""
        first = self.nodes.depths == 1
        return 1.0 - (self.beside * first).sum(dim=1)

    def joint(self) -> torch.Tensor:
        """Joint probabilities [B, N] if nobody else is asked, 0 for padding."""
        parents = self.nodes.parents.long()
        return path_product(self.alone, parents).masked_fill(~self.nodes.valid, 0.0)


class ContextWalk(NamedTuple):
    """Tries kept until it is known how the text went on; what calibration learns from.

    Rows as in :class:`ContextNodes`.
    """

    tokens: torch.Tensor  # [B, N] int64
    parents: torch.Tensor  # [B, N] int32
    depths: torch.Tensor  # [B, N] int32
    cells: torch.Tensor  # [B, N] int64, see ``Calibration.cells``
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
        # They stay where they are: CUDA graphs read them.
        self._alone = torch.empty(_CELLS, device=device)
        self._beside = torch.empty_like(self._alone)
        self._update()

    def _update(self) -> None:
        trials, hits, trials_beside, credit = self._counts
        self._alone.copy_(hits / trials)
        self._beside.copy_(credit / trials_beside)

    def cells(self, nodes: ContextNodes) -> torch.Tensor:
        """The kind of every node [B, N] int64; 0 for padding."""
        parents = nodes.parents.long()
        device = parents.device

        def bucket(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
            return torch.bucketize(values.float(), bounds, right=True)

        match, share, places = self._bounds
        rows = torch.zeros(
            len(parents), parents.shape[1] + 1, dtype=torch.int32, device=device
        )
        siblings = rows.scatter_add(1, parents, nodes.places).gather(1, parents)
        longest = rows.scatter_reduce(1, parents, nodes.matches, "amax")
        properties = (
            bucket(nodes.matches + nodes.depths - 1, match),
            bucket(nodes.places / siblings.clamp(min=1), share),
            bucket(nodes.places, places),
            (nodes.matches < longest.gather(1, parents)).long(),
        )
        cell = torch.zeros_like(parents)
        for size, value in zip(_SHAPE, properties, strict=True):
            cell = cell * size + value
        return cell.masked_fill(~nodes.valid, 0)

    def judge(self, nodes: ContextNodes) -> ContextCandidates:
        """The nodes with what they are worth."""
        cells = self.cells(nodes)
        alone, beside = (
            _shared_out(of_cell[cells], nodes)
            for of_cell in (self._alone, self._beside)
        )
        return ContextCandidates(nodes, cells, alone, beside)

    def observe(
        self,
        walk: ContextWalk,
        emitted: torch.Tensor,  # [B, T] int64, what followed the root, -1 padded
    ) -> None:
        """Learn from how the texts went on."""
        last = emitted.shape[1] - 1
        told = emitted.gather(1, (walk.depths.long() - 1).clamp(0, last))
        known = (walk.depths > 0) & (walk.depths <= last + 1) & (told >= 0)
        hit = known & (walk.tokens == told)
        parent_hit = _path_all(hit, walk.parents.long())
        tried = known & parent_hit
        beside = tried & ~walk.credit.isnan()
        columns = (
            tried,
            tried & hit,
            beside,
            torch.where(beside & hit, walk.credit, 0.0),
        )
        # Not bincount: on a GPU it waits for the largest value.
        seen = torch.stack([column.flatten().double() for column in columns])
        cells = walk.cells.flatten().expand_as(seen)
        self._counts.scatter_add_(1, cells, seen)
        for trials in (0, 2):
            fade = (_MAX_TRIALS / self._counts[trials]).clamp(max=1.0)
            self._counts[trials : trials + 2] *= fade
        self._update()


def _shared_out(
    probabilities: torch.Tensor,  # [B, N]
    nodes: ContextNodes,
) -> torch.Tensor:
    """The same, 0 for padding, scaled down where siblings would hold too much."""
    probabilities = probabilities.masked_fill(~nodes.valid, 0.0)
    parents = nodes.parents.long()
    held = held_below(probabilities, parents).gather(1, parents)
    return probabilities * (_MAX_SUM / held.clamp(min=_MAX_SUM))


def held_below(
    weights: torch.Tensor,  # [B, N]
    parents: torch.Tensor,  # [B, N] int64, rows
) -> torch.Tensor:
    """What the children of every row hold together [B, N + 1]; row 0 is the root."""
    rows = weights.new_zeros(len(weights), weights.shape[1] + 1)
    return rows.scatter_add(1, parents, weights)


def path_product(
    below: torch.Tensor,  # [B, N] probability below the parent
    parents: torch.Tensor,  # [B, N] int64, rows
) -> torch.Tensor:
    """The product along the path of every node [B, N], by pointer jumping."""
    product = torch.nn.functional.pad(below, (1, 0), value=1.0)
    pointer = torch.nn.functional.pad(parents, (1, 0))
    for _ in range(parents.shape[1].bit_length()):
        product = product * product.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return product[:, 1:]


def _path_all(
    on: torch.Tensor,  # [B, N] bool
    parents: torch.Tensor,  # [B, N] int64, rows
) -> torch.Tensor:
    """Whether all strict ancestors of every node are on [B, N] bool.

    Pointer jumping: every round doubles the ancestors that are looked at.
    """
    path = torch.nn.functional.pad(on, (1, 0), value=True)
    pointer = torch.nn.functional.pad(parents, (1, 0))
    for _ in range(max(1, parents.shape[1]).bit_length()):
        path = path & path.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    return path.gather(1, parents)
