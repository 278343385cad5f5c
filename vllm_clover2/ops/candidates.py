# SPDX-License-Identifier: Apache-2.0
"""References of the ops over a pool of candidates; see ``tree/candidates.py``.

A pool has rows: 0 is the root, 1..N are context nodes, the head's candidates follow.
Parents stand in lower rows. B requests are padded to the same number of rows; rows of
no candidate have the log-probability -inf.
"""

import torch

from vllm_clover2.ops.calibration import held_below

_LEAST_CREDIT = 1e-6
"""Keeps the credit of a context node finite where neither source expected it."""
_GRID = 2.0**-12
_LEAST_LOG = -60.0
"""Sums of 63 of these stay within the 24 bits of a float32."""


def add_candidates(
    tokens: torch.Tensor,  # [B, T] int64
    parents: torch.Tensor,  # [B, T] int64
    joint: torch.Tensor,  # [B, T] float32, log
    below: torch.Tensor,  # [B, N] float32
    credit: torch.Tensor,  # [B, N] float32
    by_head: torch.Tensor,  # [B, N] bool
    depths: torch.Tensor,  # [B, N] int32, padding 0
    beside: torch.Tensor,  # [B, N] float32
    first: int,  # row of the first new candidate
    level: int,  # depth of the new candidates
    rows: torch.Tensor,  # [B, F] int64
    open_: torch.Tensor,  # [B, F] float32
    asked: torch.Tensor,  # [A] int64, places in the flat frontier
    child_values: torch.Tensor,  # [A, k] float32
    child_tokens: torch.Tensor,  # [A, k] int64
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A head's children of a frontier: the pool's rows ``first`` to ``first + F k``.

    A child that is a context node as well gets no row: the node's probability below
    its parent becomes the mixture of both. Changes all tensors from ``tokens`` to
    ``by_head``. Returns the next frontier, the ``width`` likeliest nodes of this level
    whose parents were asked about: rows [B, W] int64, tokens [B, W] int64 (0 where
    there is none), index [B, W] int64 into the ``asked`` of each one's parent, and
    what a head can add below it [B, W] float32.
    """
    requests, size = rows.shape
    nodes, children = depths.shape[1], child_values.shape[1]
    state = torch.full_like(rows, -1).flatten()
    state[asked] = torch.arange(len(asked), device=rows.device)
    was_asked = (state.view_as(rows) >= 0) & (open_ > 0.0)
    state = torch.where(was_asked, state.view_as(rows), 0)
    values = child_values[state].masked_fill(~was_asked[..., None], -torch.inf)
    drafted = child_tokens[state]

    own_parents, valid = parents[:, 1 : 1 + nodes], depths > 0
    twin = (own_parents[:, None] == rows[..., None]) & valid[:, None]  # [B, F, N]
    twin &= was_asked[..., None]
    same = tokens[:, None, None, 1 : 1 + nodes] == drafted[..., None]
    twin = same & twin[:, :, None]  # [B, F, k, N]

    held = held_below(beside, own_parents)  # [B, 1 + N]
    own = rows <= nodes  # a context node, or the root
    row_or_root = rows.masked_fill(~own, 0)
    # State of each context row that the head was asked about, -1: none.
    states = torch.full_like(held, -1, dtype=torch.int64).scatter_reduce(
        1, row_or_root, torch.where(was_asked & own, state, -1), "amax"
    )
    mixed = (states.gather(1, own_parents) >= 0) & valid
    head = (values.exp()[..., None] * twin).sum((1, 2))  # [B, N]
    mixture = beside + (1.0 - held.gather(1, own_parents)) * head
    mixture = mixture.clamp(max=1.0)
    below.copy_(torch.where(mixed, mixture, below))
    share = beside / mixture.clamp(min=_LEAST_CREDIT)
    credit.copy_(torch.where(mixed, share, credit))
    by_head |= twin.any(2).any(1)
    joint[:, : 1 + nodes] = _context_joint(below, own_parents, valid)

    held_by_row = held.gather(1, row_or_root).masked_fill(~own, 0.0)
    above = joint.gather(1, rows) + torch.log1p(-held_by_row)
    new = (above[..., None] + values).masked_fill(twin.any(-1), -torch.inf)
    end = first + size * children
    joint[:, first:end] = new.flatten(1)
    tokens[:, first:end] = drafted.flatten(1)
    parents[:, first:end] = rows.repeat_interleave(children, dim=1)

    here = (depths == level) & mixed
    ours = joint[:, 1 : 1 + nodes].masked_fill(~here, -torch.inf)
    best, chosen = _top(torch.cat([ours, new.flatten(1)], dim=1), width)
    of_parent = torch.cat(
        [states.gather(1, own_parents), state.repeat_interleave(children, dim=1)], 1
    )
    new_rows = torch.arange(first, end, device=rows.device)
    own_rows = torch.arange(1, 1 + nodes, device=rows.device)
    next_rows = torch.cat([own_rows, new_rows])[chosen]
    held = torch.nn.functional.pad(held[:, 1:], (0, size * children))
    none = best == -torch.inf
    return (
        next_rows,
        tokens.gather(1, next_rows).masked_fill(none, 0),
        of_parent.gather(1, chosen).masked_fill(none, 0),
        best.exp() * (1.0 - held.gather(1, chosen)),
    )


def best_candidates(
    parents: torch.Tensor,  # [B, T] int64
    joint: torch.Tensor,  # [B, T] float32, log; rows 1..N are computed here
    below: torch.Tensor,  # [B, N] float32
    depths: torch.Tensor,  # [B, N] int32, padding 0
    num_nodes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The likeliest candidates of every request as a tree, parents first.

    Order: falling joint probability, ties by row. Returns rows of the pool [B, n] int64
    (0 padded), parents [B, n] int32 as rows of the tree, depths [B, n] int32 (0
    padded), log-probabilities [B, n] float32 (-inf padded) and sizes [B] int32; n is
    the smaller of ``num_nodes`` and T - 1.
    """
    nodes = depths.shape[1]
    joint = joint.clone()
    own_parents = parents[:, 1 : 1 + nodes]
    joint[:, : 1 + nodes] = _context_joint(below, own_parents, depths > 0)
    values, order = joint[:, 1:].sort(dim=1, descending=True, stable=True)
    row_of = torch.empty_like(order)
    ranks = torch.arange(1, joint.shape[1], device=joint.device)
    row_of.scatter_(1, order, ranks.expand_as(order))
    row_of = torch.nn.functional.pad(row_of, (1, 0))  # the root stays row 0

    values, rows = values[:, :num_nodes], order[:, :num_nodes] + 1
    kept = values > -torch.inf
    rows = rows.masked_fill(~kept, 0)
    links = row_of.gather(1, parents.gather(1, rows)).masked_fill(~kept, 0)
    tree_depths = _depths(links).masked_fill(~kept, 0)
    sizes = kept.sum(1, dtype=torch.int32)
    return rows, links.int(), tree_depths.int(), values, sizes


def _context_joint(
    below: torch.Tensor,  # [B, N]
    parents: torch.Tensor,  # [B, N] int64, rows
    valid: torch.Tensor,  # [B, N] bool
) -> torch.Tensor:
    """Log joint probabilities of the root and the context's rows, [B, 1 + N].

    Pointer jumping over the logs of what holds below each parent. They lie on a grid
    on which sums are exact in any order, or else a child could end up above its parent
    by a rounding error.
    """
    logs = ((below.log() / _GRID).floor() * _GRID).clamp(min=_LEAST_LOG)
    logs = torch.nn.functional.pad(logs, (1, 0))
    pointer = torch.nn.functional.pad(parents, (1, 0))
    for _ in range(max(1, parents.shape[1]).bit_length()):
        logs = logs + logs.gather(1, pointer)
        pointer = pointer.gather(1, pointer)
    padding = torch.nn.functional.pad(~valid, (1, 0))
    return logs.masked_fill(padding, -torch.inf)


def _top(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row, ties by index; topk itself leaves their order open."""
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


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
