# SPDX-License-Identifier: Apache-2.0
"""What a step means, on tensors: the same for Model Runner V1 and V2.

A request's rows in a step are those up to its root (more than one while its prompt is
computed), then the nodes of its tree. Nodes are numbered from the root, row 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from vllm.distributed.parallel_state import get_tp_group

from vllm_clover2 import ops
from vllm_clover2.integration.attention import kv_layout
from vllm_clover2.tree.types import NO_TOKEN, GrownTrees


class Accepted(NamedTuple):
    """Which path of each tree the picks of the target follow, R requests."""

    tokens: torch.Tensor  # [R, max_depth + 1] int64 emitted, -1 padded
    paths: torch.Tensor  # [R, max_depth] int32 accepted rows, -1 padded
    lengths: torch.Tensor  # [R] int32 accepted rows


def accept(
    picks: torch.Tensor,  # [rows] int64 what the target picks after each row
    tokens: torch.Tensor,  # [rows] int64 drafted, -1: no draft (every root)
    parents: torch.Tensor,  # [rows] int32, root: -1
    row_offsets: torch.Tensor,  # [R + 1] int32
    max_depth: int,
) -> Accepted:
    """Walk every tree along the picks; emitted are those after the visited rows."""
    paths, lengths, _ = ops.tree_accept(picks, tokens, parents, row_offsets, max_depth)
    visited = torch.cat([torch.zeros_like(lengths)[:, None], paths], dim=1)
    flat = visited.clamp(min=0) + row_offsets[:-1, None]
    emitted = torch.where(visited < 0, NO_TOKEN, picks[flat.long()])
    return Accepted(emitted, paths, lengths)


def commit(
    layers: Sequence[Any],  # attention layers of the target with one block table
    block_table: torch.Tensor,  # [R, max_blocks] int32
    root_positions: torch.Tensor,  # [R] int32
    paths: torch.Tensor,  # [R, max_depth] int32 accepted rows
    lengths: torch.Tensor,  # [R] int32
) -> None:
    """Move accepted rows to where decoding one by one would have put them.

    Must be done in the step that accepts: the scheduler hashes these slots for prefix
    caching, or frees them, before the next one.
    """
    ops.commit_kv(
        [layer.kv_cache for layer in layers],
        kv_layout(layers[0]),
        block_table,
        root_positions,
        paths,
        lengths,
    )


def rows_of_text(
    requests: torch.Tensor,  # [n] int64 request of each row wanted
    places: torch.Tensor,  # [n] int64 which one of its request's rows, from 0
    first_rows: torch.Tensor,  # [R] first row of each request in the step
    root_rows: torch.Tensor,  # [R] row of each root in the step
    paths: torch.Tensor,  # [R, max_depth] int32 accepted rows
) -> torch.Tensor:
    """Rows [n] of the step that are text now, in the order of the text.

    Of each request those up to its root, then the accepted nodes. Beyond the last one
    the root's row stands.
    """
    roots = root_rows[requests]
    first = first_rows[requests]
    level = places - (roots - first)  # 0 is the root, from 1 on nodes
    last = max(paths.shape[1] - 1, 0)
    nodes = paths[requests, (level - 1).clamp(0, last)] if paths.shape[1] else level
    return torch.where(level > 0, roots + nodes.clamp(min=0), first + places)


def of_first_rank(trees: GrownTrees) -> GrownTrees:
    """The trees of tensor-parallel rank 0.

    The scheduler tells every rank the drafted tokens but not their parents, and the
    last bit of an all-reduce may differ between ranks; a tie broken differently would
    give them different trees.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return trees
    return GrownTrees(*(group.broadcast(part.contiguous()) for part in trees))
