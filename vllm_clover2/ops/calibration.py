# SPDX-License-Identifier: Apache-2.0
"""References of the ops that tell what a text's own candidates are worth.

``tree/context.py`` has the meaning of the tables. Nodes are those of ``ContextNodes``:
B tries padded to N nodes, node i is row i + 1, parents stand in lower rows.
"""

import torch


def judge_context(
    parents: torch.Tensor,  # [B, N] int32
    depths: torch.Tensor,  # [B, N] int32, padding 0
    matches: torch.Tensor,  # [B, N] int32
    places: torch.Tensor,  # [B, N] int32
    bounds: list[torch.Tensor],  # of match, share and places, float32, ascending
    values: torch.Tensor,  # [2, C] float32 by kind: alone, beside a head
    max_sum: float,  # that siblings hold together
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kind of every node, and what it is worth.

    Returns cells [B, N] int64, and as float32 [B, N] the probability below its parent
    where nobody else is asked, its weight beside a head, and the product of the former
    along its path; all are 0 for padding.
    """
    above = parents.long()
    cells = _cells(above, depths, matches, places, bounds)
    alone, beside = (
        _shared_out(of_kind[cells].masked_fill(depths == 0, 0.0), above, max_sum)
        for of_kind in values
    )
    return cells, alone, beside, path_product(alone, above)


def _cells(
    parents: torch.Tensor,  # [B, N] int64
    depths: torch.Tensor,
    matches: torch.Tensor,
    places: torch.Tensor,
    bounds: list[torch.Tensor],
) -> torch.Tensor:
    def bucket(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(values.float(), bounds, right=True)

    match, share, agreeing = bounds
    rows = matches.new_zeros(len(parents), parents.shape[1] + 1)
    siblings = rows.scatter_add(1, parents, places).gather(1, parents)
    longest = rows.scatter_reduce(1, parents, matches, "amax").gather(1, parents)
    cells = bucket(matches + depths - 1, match)
    cells = cells * (len(share) + 1) + bucket(places / siblings.clamp(min=1), share)
    cells = cells * (len(agreeing) + 1) + bucket(places, agreeing)
    return (2 * cells + (matches < longest)).masked_fill(depths == 0, 0)


def _shared_out(
    weights: torch.Tensor,  # [B, N]
    parents: torch.Tensor,  # [B, N] int64
    max_sum: float,
) -> torch.Tensor:
    """The same, scaled down where siblings would hold too much."""
    held = held_below(weights, parents).gather(1, parents)
    return weights * (max_sum / held.clamp(min=max_sum))


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


def learn_context(
    # [4, C] float64 by kind: trials and hits; trials beside a head and credit.
    counts: torch.Tensor,
    values: torch.Tensor,  # [2, C] float32, what follows from them
    tokens: torch.Tensor,  # [B, N] int64
    parents: torch.Tensor,  # [B, N] int32
    depths: torch.Tensor,  # [B, N] int32
    cells: torch.Tensor,  # [B, N] int64, kinds
    credit: torch.Tensor,  # [B, N] float32, NaN where a head was not asked
    emitted: torch.Tensor,  # [B, T] int64, what followed the root, -1 padded
    max_trials: float,
) -> None:
    """Count what became of the nodes; changes ``counts`` and ``values``.

    A node was tried if its parent became text and it is known what followed. Counts
    of a kind fade once it has ``max_trials``.
    """
    last = emitted.shape[1] - 1
    told = emitted.gather(1, (depths.long() - 1).clamp(0, last))
    known = (depths > 0) & (depths <= last + 1) & (told >= 0)
    hit = known & (tokens == told)
    tried = known & _path_all(hit, parents.long())
    beside = tried & ~credit.isnan()
    columns = (tried, tried & hit, beside, torch.where(beside & hit, credit, 0.0))
    # Not bincount: on a GPU it waits for the largest value.
    seen = torch.stack([column.flatten().double() for column in columns])
    counts.scatter_add_(1, cells.flatten().expand_as(seen), seen)
    for pair in range(2):
        trials = counts[2 * pair]
        counts[2 * pair : 2 * pair + 2] *= (max_trials / trials).clamp(max=1.0)
        values[pair] = (counts[2 * pair + 1] / trials).float()


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
