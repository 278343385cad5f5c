# SPDX-License-Identifier: Apache-2.0
"""Growing trees from a draft model, a level at a time for all requests together."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vllm_clover2.tree.shapes import TreeShape
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees


class Draft(Protocol):
    """What growing needs of a draft model; it touches no KV cache."""

    def first(
        self,
        hidden: torch.Tensor,  # [B, H]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State [B, H] at the root and log-probabilities [B, Vd] below it."""

    def advance(
        self,
        state: torch.Tensor,  # [M, H] of the nodes' parents
        tokens: torch.Tensor,  # [M] int64, the nodes' tokens, target vocabulary
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State [M, H] at the nodes and log-probabilities [M, Vd] below them."""

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        """Target-vocabulary ids of draft-vocabulary ids."""


@dataclass(frozen=True)
class DynamicTree:
    """Limits of a tree that is shaped by the draft's own probabilities."""

    num_nodes: int  # kept after growing: the best by joint probability
    top_k: int = 8  # children tried per node, and nodes expanded per level
    depth: int = 5
    top_p: float = 1.0
    # Clover-1 against flat tails: at 0.25, 0.6 / 0.1 / 0.1 / 0.1 keeps one child.
    min_ratio: float = 0.0
    # Give no children to nodes of a joint probability below ``min_expanded``, nor to a
    # level whose other nodes hold less than ``min_level_mass``, all requests together.
    # Looking waits for the device; with 0 for both nothing is looked at.
    min_expanded: float = 0.0
    min_level_mass: float = 0.0

    def without_nodes_below(self, joint: float) -> "DynamicTree":
        """The limits of trees in which no less likely node than ``joint`` counts.

        A level's nodes exclude each other, so at most 1 / ``joint`` of them count, and
        no node below it can have a child that does.
        """
        top_k = min(self.top_k, max(1, int(1.0 / joint))) if joint else self.top_k
        looks = self.min_expanded > 0.0
        min_expanded = max(self.min_expanded, joint) if looks else 0.0
        return dataclasses.replace(self, top_k=top_k, min_expanded=min_expanded)


class _Children(NamedTuple):
    """The children of M nodes, likeliest first."""

    tokens: torch.Tensor  # [M, k] int64, target vocabulary
    log_probs: torch.Tensor  # [M, k]


def _likeliest(draft: Draft, log_probs: torch.Tensor, count: int) -> _Children:
    """The ``count`` likeliest children of every node; log_probs [M, Vd]."""
    # A draft that diverged proposes nothing: NaN would be taken for the likeliest.
    log_probs = log_probs.masked_fill(log_probs.isnan(), -torch.inf)
    values, draft_ids = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    # Rounding may lift log(1) above 0, and then a child above its parent.
    return _Children(draft.token_ids(draft_ids), values.float().clamp(max=0.0))


def _apply_token_rule(children: _Children, tree: DynamicTree) -> torch.Tensor:
    """Log-probabilities [M, k], -inf for children that are not worth a node.

    Kept is a child while the likelier ones hold less than top_p together, if it also
    has at least ``min_ratio`` of the first one's probability. The first always stays.
    """
    probs = children.log_probs.exp()
    likelier = probs.cumsum(dim=-1) - probs
    keep = probs >= tree.min_ratio * probs[:, :1]
    if tree.top_p < 1.0:
        keep &= likelier < tree.top_p
    keep[:, 0] = True
    return children.log_probs.masked_fill(~keep, -torch.inf)


def grow_dynamic(
    draft: Draft,
    hidden: torch.Tensor,  # [B, H] draft hidden state at the root
    tree: DynamicTree,
) -> GrownTrees:
    """The ``num_nodes`` likeliest nodes of trees grown to ``depth``.

    Every level expands its ``top_k`` likeliest nodes. Order: falling joint
    probability, ties by level and rank. A child is never likelier than its parent, so
    parents come first and every prefix is the best tree of its size.
    """
    requests = hidden.shape[0]
    state, log_probs = draft.first(hidden)
    children = _likeliest(draft, log_probs, tree.top_k)
    width = children.tokens.shape[1]
    # All candidates so far, level by level: a growing list of [B, candidates].
    tokens = [children.tokens]
    joint = [_apply_token_rule(children, tree)]
    parents = [torch.full_like(children.tokens, -1)]  # index of the parent candidate

    frontier = torch.arange(width, device=hidden.device).expand(requests, width)
    state = state[:, None].expand(-1, width, -1)
    base = 0  # candidates above this level
    for _ in range(1, tree.depth):
        above = joint[-1].gather(1, frontier)
        expanded = _worth_expanding(above.flatten(), tree)
        if expanded is None:
            break
        grown, below, child_tokens = (
            rows.unflatten(0, above.shape)
            for rows in _expand(
                draft,
                tree,
                state.flatten(0, 1),
                tokens[-1].gather(1, frontier).flatten(),
                expanded,
            )
        )
        parents.append((frontier + base).repeat_interleave(width, dim=1))
        base += joint[-1].shape[1]
        joint.append((above[:, :, None] + below).flatten(1))
        tokens.append(child_tokens.flatten(1))
        # The next level's frontier, and for each the row of ``grown`` it grew from.
        frontier = joint[-1].topk(width, dim=1).indices
        row = (frontier // width)[:, :, None].expand(-1, -1, grown.shape[-1])
        state = grown.gather(1, row)
    return _best(torch.cat(tokens, 1), torch.cat(joint, 1), torch.cat(parents, 1), tree)


def _worth_expanding(
    joint: torch.Tensor,  # [M] log-probabilities of a level's nodes
    tree: DynamicTree,
) -> torch.Tensor | slice | None:
    """Index of the nodes that get children; None if the level gets none."""
    if not tree.min_expanded and not tree.min_level_mass:
        return slice(None)
    probs = joint.exp()
    expanded = (probs >= tree.min_expanded).nonzero()[:, 0]
    if not len(expanded) or float(probs[expanded].sum()) < tree.min_level_mass:
        return None
    return expanded


def _expand(
    draft: Draft,
    tree: DynamicTree,
    state: torch.Tensor,  # [M, H] of the nodes' parents
    tokens: torch.Tensor,  # [M] of the nodes
    expanded: torch.Tensor | slice,  # those that get children
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """State [M, H] at the nodes; their children's log-probabilities and tokens [M, k].

    Children of a node that is not expanded have log-probability -inf.
    """
    nodes = len(state)
    state, log_probs = draft.advance(state[expanded], tokens[expanded])
    children = _likeliest(draft, log_probs, tree.top_k)

    def in_place(rows: torch.Tensor, other: float) -> torch.Tensor:
        if len(rows) == nodes:
            return rows
        everywhere = rows.new_full((nodes, rows.shape[1]), other)
        everywhere[expanded] = rows
        return everywhere

    return (
        in_place(state, 0.0),
        in_place(_apply_token_rule(children, tree), -torch.inf),
        in_place(children.tokens, NO_TOKEN),
    )


def _best(
    tokens: torch.Tensor,  # [B, C] int64, level by level
    joint: torch.Tensor,  # [B, C] float32, -inf: not a node
    parents: torch.Tensor,  # [B, C] int64, index of the parent candidate, -1: root
    tree: DynamicTree,
) -> GrownTrees:
    """The best nodes; parents become row numbers."""
    requests, candidates = joint.shape
    count = min(tree.num_nodes, candidates)
    # Stable: of equal nodes the one nearer to the root stays first, so a child with
    # probability 1 follows its parent.
    joint, order = joint.sort(dim=1, descending=True, stable=True)
    row_of = torch.empty_like(order)
    rows = torch.arange(1, candidates + 1, device=order.device)
    row_of.scatter_(1, order, rows.expand(requests, -1))
    row_of = torch.nn.functional.pad(row_of, (1, 0))  # index 0: the root, row 0

    joint, order = joint[:, :count], order[:, :count]
    valid = joint > -torch.inf
    parents = row_of.gather(1, parents.gather(1, order) + 1).masked_fill(~valid, 0)
    tokens = tokens.gather(1, order).masked_fill(~valid, NO_TOKEN)
    depths = _depths(parents, tree.depth).masked_fill(~valid, 0)
    return GrownTrees(
        tokens, parents.int(), depths.int(), joint, valid.sum(1, dtype=torch.int32)
    )


def _depths(
    parents: torch.Tensor,  # [B, N] int64, row numbers
    max_depth: int,
) -> torch.Tensor:
    """Depths [B, N] int64: each round lets every node look one level further up."""
    depths = torch.ones_like(parents)
    for _ in range(1, max_depth):
        with_root = torch.nn.functional.pad(depths, (1, 0))
        depths = with_root.gather(1, parents) + 1
    return depths


class _Level(NamedTuple):
    """How one level of a static tree grows from the one above, as index tensors."""

    grown: torch.Tensor  # [rows] nodes, of the level above, that have children
    source: torch.Tensor  # [rows] row of the level above's states they continue
    row: torch.Tensor  # [nodes] row of this level that each new node is a child of
    rank: torch.Tensor  # [nodes]
    top_k: int


@functools.lru_cache(maxsize=16)
def _levels(shape: TreeShape, device: torch.device) -> tuple[_Level, ...]:
    """The growth plan of a shape; ``grown`` and ``source`` count within a level."""

    def index(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    levels = []
    above: list[tuple[int, ...]] = [()]
    above_rows: dict[tuple[int, ...], int] = {}
    for depth in range(1, shape.depth + 1):
        nodes = [path for path in shape.paths if len(path) == depth]
        owners = sorted({path[:-1] for path in nodes})
        rows = {path: row for row, path in enumerate(owners)}
        levels.append(
            _Level(
                grown=index([above.index(path) for path in owners]),
                source=index([above_rows.get(path[:-1], 0) for path in owners]),
                row=index([rows[path[:-1]] for path in nodes]),
                rank=index([path[-1] for path in nodes]),
                top_k=max(path[-1] for path in nodes) + 1,
            )
        )
        above, above_rows = nodes, rows
    return tuple(levels)


@functools.lru_cache(maxsize=16)
def _static_rows(
    shape: TreeShape, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents and depths [N] int32 of a shape."""
    depths = [len(path) for path in shape.paths]
    return (
        torch.tensor(shape.parents, dtype=torch.int32, device=device),
        torch.tensor(depths, dtype=torch.int32, device=device),
    )


def grow_static(
    draft: Draft,
    hidden: torch.Tensor,  # [B, H] draft hidden state at the root
    shape: TreeShape,
) -> GrownTrees:
    """Fills a static tree with the draft's likeliest tokens."""
    requests, device = hidden.shape[0], hidden.device
    tokens: list[torch.Tensor] = []
    joint: list[torch.Tensor] = []
    state, log_probs = draft.first(hidden)
    above = log_probs.new_zeros((requests, 1), dtype=torch.float32)
    rows = 1  # of every request, in ``state``
    for level in _levels(shape, device):
        if tokens:
            states = state.view(requests, rows, state.shape[-1])[:, level.source]
            state, log_probs = draft.advance(
                states.flatten(0, 1), tokens[-1][:, level.grown].flatten()
            )
            above = joint[-1][:, level.grown]
            rows = len(level.grown)
        children = _likeliest(draft, log_probs, level.top_k)
        pick = level.row * level.top_k + level.rank
        all_children = (requests, rows * level.top_k)
        tokens.append(children.tokens.view(all_children)[:, pick])
        below = children.log_probs.view(all_children)[:, pick]
        joint.append(above[:, level.row] + below)
    parents, depths = _static_rows(shape, device)
    all_joint = torch.cat(joint, dim=1)
    # A tree ends before its first node without a score.
    sizes = (all_joint > -torch.inf).cumprod(dim=1).sum(dim=1, dtype=torch.int32)
    return GrownTrees(
        torch.cat(tokens, dim=1),
        parents.expand(requests, -1),
        depths.expand(requests, -1),
        all_joint,
        sizes,
    )
