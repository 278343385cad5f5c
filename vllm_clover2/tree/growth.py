# SPDX-License-Identifier: Apache-2.0
"""Growing trees from a draft model, a level at a time for all requests together."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from vllm_clover2.tree.candidates import CandidatePool
from vllm_clover2.tree.context import ContextCandidates
from vllm_clover2.tree.shapes import TreeShape
from vllm_clover2.tree.types import GrownTrees, Source, TopK

_LEAST_OPEN = 1e-30
"""Below is nothing: a place of the frontier without a node."""


class Draft(Protocol):
    """What growing needs of a draft model; it touches no KV cache."""

    def first_top_k(
        self,
        hidden: torch.Tensor,  # [B, H]
        k: int,
    ) -> tuple[torch.Tensor, TopK]:
        """State [B, H] at the root and the k likeliest children below it."""

    def advance_top_k(
        self,
        state: torch.Tensor,  # [M, H] of the nodes' parents
        tokens: torch.Tensor,  # [M] int64, the nodes' tokens, target vocabulary
        k: int,
    ) -> tuple[torch.Tensor, TopK]:
        """State [M, H] at the nodes and the k likeliest children below each."""


@dataclass(frozen=True)
class DynamicTree:
    """Limits of a tree that is shaped by its candidates' probabilities."""

    num_nodes: int  # kept after growing: the best by joint probability
    top_k: int = 8  # children tried per node, and nodes expanded per level
    depth: int = 5  # levels that the draft is asked for
    top_p: float = 1.0
    # Clover-1 against flat tails: at 0.25, 0.6 / 0.1 / 0.1 / 0.1 keeps one child.
    min_ratio: float = 0.0
    # Do not ask about nodes below which a draft can add less than ``min_expanded``
    # joint probability, nor about a level whose other nodes leave it less than
    # ``min_level_mass``, all requests together. Looking waits for the device; with 0
    # for both nothing is looked at.
    min_expanded: float = 0.0
    min_level_mass: float = 0.0

    @property
    def num_candidates(self) -> int:
        """Children of the root and of all nodes of a request that are expanded."""
        return self.top_k * (1 + (self.depth - 1) * self.top_k)

    def without_nodes_below(self, joint: float) -> "DynamicTree":
        """The limits of trees in which no less likely node than ``joint`` counts.

        A level's nodes exclude each other, so at most 1 / ``joint`` of them count, and
        no node below it can have a child that does.
        """
        top_k = min(self.top_k, max(1, int(1.0 / joint))) if joint else self.top_k
        looks = self.min_expanded > 0.0
        min_expanded = max(self.min_expanded, joint) if looks else 0.0
        return dataclasses.replace(self, top_k=top_k, min_expanded=min_expanded)


def _kept_children(children: TopK, tree: DynamicTree) -> TopK:
    """The children with -inf for those that are not worth a node.

    Kept is a child while the likelier ones hold less than top_p together, if it also
    has at least ``min_ratio`` of the first one's probability. The first always stays,
    unless it is none: a draft that diverges to NaN proposes nothing.
    """
    # Rounding may lift log(1) above 0, and then a child above its parent.
    log_probs = children.values.nan_to_num(-torch.inf, neginf=-torch.inf).clamp(max=0.0)
    if tree.top_p < 1.0 or tree.min_ratio > 0.0:
        probs = log_probs.exp()
        likelier = probs.cumsum(dim=-1) - probs
        keep = probs >= tree.min_ratio * probs[..., :1]
        if tree.top_p < 1.0:
            keep &= likelier < tree.top_p
        keep[..., 0] = True
        log_probs = log_probs.masked_fill(~keep, -torch.inf)
    return TopK(log_probs, children.tokens)


def grow_dynamic(
    draft: Draft,
    hidden: torch.Tensor,  # [B, H] draft hidden state at the root
    tree: DynamicTree,
) -> GrownTrees:
    """Trees of the draft alone: the ``num_nodes`` likeliest nodes of ``depth`` levels.

    Order: falling joint probability, ties by level and rank. A child is never likelier
    than its parent, so parents come first and every prefix is the best tree of its
    size.
    """
    context = ContextCandidates.none(len(hidden), hidden.device)
    pool = CandidatePool(context, tree.num_candidates)
    ask_draft(pool, draft, hidden, tree)
    return pool.best(tree.num_nodes)


def ask_draft(
    pool: CandidatePool,
    draft: Draft,
    hidden: torch.Tensor,  # [B, H] draft hidden state at the root
    tree: DynamicTree,
    ask: torch.Tensor | None = None,  # [B] bool, whom to ask for; default: all
) -> tuple[int, int]:
    """Adds the draft's candidates to a pool that may hold some of the text's own.

    Every level asks about its ``top_k`` likeliest nodes, whichever source they are
    from, as far as the draft can still add something there.

    Returns:
        Levels that were grown, and nodes that the draft was asked about.

    """
    frontier = pool.roots()
    if ask is not None:
        frontier = frontier._replace(open=frontier.open * ask[:, None])
    levels = nodes = 0
    state = hidden
    for level in range(tree.depth):
        asked = _worth_asking(frontier.open.flatten(), tree)
        if asked is None:
            break
        above = state[frontier.parents.flatten()[asked]]
        if level == 0:
            state, children = draft.first_top_k(above, tree.top_k)
        else:
            tokens = frontier.tokens.flatten()[asked]
            state, children = draft.advance_top_k(above, tokens, tree.top_k)
        levels, nodes = levels + 1, nodes + len(state)
        children = _kept_children(children, tree)
        frontier = pool.add(frontier, children, asked, tree.top_k)
    return levels, nodes


def _worth_asking(
    open_: torch.Tensor,  # [M] joint probability that the draft can add below a node
    tree: DynamicTree,
) -> torch.Tensor | None:
    """Places [A] int64 of the nodes to ask the draft about; None if no level pays."""
    if not tree.min_expanded and not tree.min_level_mass:
        return torch.arange(len(open_), device=open_.device)
    asked = (open_ >= max(tree.min_expanded, _LEAST_OPEN)).nonzero()[:, 0]
    if not len(asked) or float(open_[asked].sum()) < tree.min_level_mass:
        return None
    return asked


class _Level(NamedTuple):
    """How one level of a static tree grows from the one above, as index tensors."""

    grown: torch.Tensor  # [rows] nodes, of the level above, that have children
    source: torch.Tensor  # [rows] row of the level above's states they continue
    row: torch.Tensor  # [nodes] row of this level that each new node is a child of
    rank: torch.Tensor  # [nodes]
    top_k: int


@functools.cache  # for good: CUDA graphs read them
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


@functools.cache
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
    state = hidden
    above = hidden.new_zeros((requests, 1), dtype=torch.float32)
    rows = 1  # of every request, in ``state``
    for level in _levels(shape, device):
        if tokens:
            states = state.view(requests, rows, state.shape[-1])[:, level.source]
            state, children = draft.advance_top_k(
                states.flatten(0, 1),
                tokens[-1][:, level.grown].flatten(),
                level.top_k,
            )
            above = joint[-1][:, level.grown]
            rows = len(level.grown)
        else:
            state, children = draft.first_top_k(hidden, level.top_k)
        pick = level.row * level.top_k + level.rank
        all_children = (requests, rows * level.top_k)
        tokens.append(children.tokens.view(all_children)[:, pick])
        below = children.values.view(all_children)[:, pick]
        joint.append(above[:, level.row] + below)
    parents, depths = _static_rows(shape, device)
    all_tokens, all_joint = torch.cat(tokens, dim=1), torch.cat(joint, dim=1)
    # A draft that diverges to NaN ends the tree: what comes before still counts.
    usable = (all_joint > -torch.inf).cumprod(dim=1)
    return GrownTrees(
        all_tokens,
        parents.expand(requests, -1),
        depths.expand(requests, -1),
        all_joint,
        usable.sum(dim=1, dtype=torch.int32),
        torch.full_like(all_tokens, Source.HEAD, dtype=torch.int8),
    )
