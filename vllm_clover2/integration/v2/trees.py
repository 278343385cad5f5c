# SPDX-License-Identifier: Apache-2.0
"""Drafted trees on the device, from the step that drafts to the one that verifies.

A request has a slot in vLLM's tables on the device. How many nodes of a tree are
verified is known on the host, because the scheduler may cut the list anywhere; which
nodes they are is not.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_clover2.tree.grower import likeliest_chains
from vllm_clover2.tree.masks import depths_and_ancestors
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees


class DraftedRows(NamedTuple):
    """Rows of a step that belong to trees; a root has row 0 of its tree."""

    parents: torch.Tensor  # [rows] int32, root: -1
    depths: torch.Tensor  # [rows] int32
    ancestors: torch.Tensor  # [rows] int64, bit j: row j is ancestor or self
    drafted: torch.Tensor  # [rows] bool, neither a root nor padding


class DeviceTrees:
    """The trees of all requests, by slot, padded to ``num_nodes``.

    Padding hangs below the root and is never accepted. Its rows are computed, and what
    they leave in the KV cache is overwritten before anybody reads it. The last row of
    the tables, slot -1, is that of requests that only pad a batch.
    """

    def __init__(
        self, num_slots: int, num_nodes: int, max_depth: int, device: torch.device
    ) -> None:
        self.num_nodes = num_nodes
        self.max_depth = max_depth
        rows = (num_slots + 1, 1 + num_nodes)
        self._parents = torch.zeros(rows, dtype=torch.int32, device=device)
        self._parents[:, 0] = -1
        self._depths = torch.zeros(rows, dtype=torch.int32, device=device)
        numbers = torch.arange(rows[1], device=device)
        self._ancestors = (torch.ones_like(numbers) << numbers).repeat(rows[0], 1)
        self._sizes = torch.zeros(rows[0], dtype=torch.int32, device=device)
        # Log-probabilities of the nodes' paths.
        self.joint = torch.full(
            (rows[0], num_nodes), -torch.inf, dtype=torch.float32, device=device
        )
        # Rows that the last verification accepted, -1 padded.
        self.paths = torch.full(
            (num_slots, max_depth), -1, dtype=torch.int32, device=device
        )
        # Nodes verified, and accepted, since the start.
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def put(
        self,
        slots: torch.Tensor,  # [B] int64
        trees: GrownTrees,  # of these B requests
        chains: torch.Tensor | None = None,  # [B] bool, who gets the likeliest path
    ) -> torch.Tensor:
        """Keep the trees; returns their tokens [B, num_nodes] int64, padding 0."""
        trees = _padded(trees, self.num_nodes)
        if chains is not None:
            paths = _padded(likeliest_chains(trees, self.max_depth), self.num_nodes)
            trees = _where(chains, paths, trees)
        requests, rows = len(slots), 1 + self.num_nodes
        numbers = torch.arange(self.num_nodes, device=slots.device)
        padding = numbers >= trees.sizes[:, None]
        parents = torch.nn.functional.pad(
            trees.parents.masked_fill(padding, 0), (1, 0), value=-1
        )
        offsets = torch.arange(
            0, requests * rows + 1, rows, dtype=torch.int32, device=slots.device
        )
        depths, ancestors = depths_and_ancestors(parents.flatten(), offsets, rows)
        self._parents[slots] = parents
        self._depths[slots] = depths.view(requests, rows)
        self._ancestors[slots] = ancestors.view(requests, rows)
        self._sizes[slots] = trees.sizes
        self.joint[slots] = trees.joint.masked_fill(padding, -torch.inf)
        return trees.tokens.masked_fill(padding, 0)

    def rows(
        self,
        slots: torch.Tensor,  # [rows] int64 slot of each row's request
        numbers: torch.Tensor,  # [rows] int32 row of its tree, 0 is the root
    ) -> DraftedRows:
        """What is known of some rows."""
        at = slots, numbers
        return DraftedRows(
            self._parents[at],
            self._depths[at],
            self._ancestors[at],
            (numbers > 0) & (numbers <= self._sizes[slots]),
        )

    def accepted(
        self,
        slots: torch.Tensor,  # [B] int64
        paths: torch.Tensor,  # [B, max_depth] int32
        lengths: torch.Tensor,  # [B] int32
        drafted: torch.Tensor,  # [rows] bool, of all that were verified
    ) -> None:
        """Keep what the target accepted, until it is committed and drafted from."""
        self.paths[slots] = paths
        self.counts += torch.stack([drafted.sum(), lengths.sum()])


def _padded(trees: GrownTrees, num_nodes: int) -> GrownTrees:
    """The trees, cut or padded to so many nodes."""

    def fit(part: torch.Tensor, value: float) -> torch.Tensor:
        return torch.nn.functional.pad(
            part, (0, num_nodes - part.shape[1]), value=value
        )

    return GrownTrees(
        fit(trees.tokens, NO_TOKEN),
        fit(trees.parents, 0),
        fit(trees.depths, 0),
        fit(trees.joint, -torch.inf),
        trees.sizes.clamp(max=num_nodes),
        fit(trees.sources, 0),
    )


def _where(
    chosen: torch.Tensor,  # [B] bool
    ours: Sequence[torch.Tensor],
    theirs: Sequence[torch.Tensor],
) -> GrownTrees:
    """Request by request one or the other tree."""
    return GrownTrees(
        *(
            torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b)
            for a, b in zip(ours, theirs, strict=True)
        )
    )
