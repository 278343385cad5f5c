# SPDX-License-Identifier: Apache-2.0
"""From options to trees: the one place that serving and the offline replay share."""

from typing import NamedTuple

import torch

from vllm_clover2.tree.candidates import CandidatePool
from vllm_clover2.tree.context import Calibration, ContextCandidates, ContextWalk
from vllm_clover2.tree.growth import Draft, DynamicTree, ask_draft, grow_static
from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.types import MAX_NODES, GrownTrees


class Growth(NamedTuple):
    """Trees of B requests, and what growing them took."""

    trees: GrownTrees
    walk: ContextWalk | None  # what calibration learns from when they are verified
    levels: int = 0  # that a draft was asked for
    asked: int = 0  # nodes that it was asked about


class TreeGrower:
    """Grows the trees that some options ask for and learns how far to trust a text."""

    def __init__(
        self, options: TreeOptions, device: torch.device | str = "cpu"
    ) -> None:
        self.options = options
        self.calibration = Calibration(device)
        self._shape = options.static_shape() if options.has_fixed_shape else None

    def grow(
        self,
        draft: Draft | None,  # None: the text is the only source
        hidden: torch.Tensor,  # [B, H] draft hidden states at the roots
        context: ContextCandidates | None,  # of the same B requests, same device
        ask: torch.Tensor | None = None,  # [B] bool, whom to ask the draft for; all
        limits: DynamicTree | None = None,  # default: those of the options
    ) -> Growth:
        """Trees below B roots."""
        if self._shape is not None:
            if draft is None:
                return Growth(GrownTrees.empty(len(hidden), hidden.device), None)
            trees = grow_static(draft, hidden, self._shape)
            sizes = trees.sizes if ask is None else trees.sizes * ask
            return Growth(trees._replace(sizes=sizes), None)
        limits = limits or self.options.dynamic_tree()
        if context is None:
            context = ContextCandidates.none(len(hidden), hidden.device)
        room = limits.num_candidates if draft is not None else 0
        pool = CandidatePool(context, room)
        levels = asked = 0
        if draft is not None:
            levels, asked = ask_draft(pool, draft, hidden, limits, ask)
        if self.options.tree == "chain":
            trees = likeliest_chains(pool.best(MAX_NODES), limits.num_nodes)
        else:
            trees = pool.best(limits.num_nodes)
        return Growth(trees, pool.walk(), levels, asked)


def likeliest_chains(trees: GrownTrees, length: int) -> GrownTrees:
    """The path of at most ``length`` nodes that follows the likeliest children."""
    node = torch.zeros_like(trees.sizes)
    path, on_path = [], []
    for _ in range(min(length, trees.parents.shape[1])):
        # Siblings stand in falling order. Padding has depth 0.
        below = (trees.parents == node[:, None]) & (trees.depths > 0)
        found = below.any(dim=1)
        first = below.int().argmax(dim=1)
        path.append(first)
        on_path.append(found)
        node = torch.where(found, first + 1, -1).int()
    if not path:
        return trees
    rows, kept = torch.stack(path, dim=1), torch.stack(on_path, dim=1)
    levels = torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device)
    return GrownTrees(
        trees.tokens.gather(1, rows),
        levels.expand_as(rows),
        (levels + 1).expand_as(rows),
        trees.joint.gather(1, rows).masked_fill(~kept, -torch.inf),
        kept.sum(dim=1, dtype=torch.int32),
        trees.sources.gather(1, rows),
    )
