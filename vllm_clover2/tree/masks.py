# SPDX-License-Identifier: Apache-2.0
"""Depths and ancestor masks of many trees at once."""

import torch


def depths_and_ancestors(
    parents: torch.Tensor,  # [rows] int32, row numbers within the request, root: -1
    row_offsets: torch.Tensor,  # [R + 1] int32
    max_rows: int,  # upper bound of one request's rows, at most 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth [rows] int32 and ancestors-or-self word [rows] int64 of every row.

    Pointer jumping: after k rounds each row has merged its nearest 2**k ancestors and
    points at the next one, so no tree needs more than log2(its longest path) rounds.

    >>> parents = torch.tensor([-1, 0, 1, 0], dtype=torch.int32)
    >>> depths, ancestors = depths_and_ancestors(
    ...     parents, torch.tensor([0, 4], dtype=torch.int32), 4)
    >>> depths.tolist(), [f"{word:04b}" for word in ancestors.tolist()]
    ([0, 1, 2, 1], ['0001', '0011', '0111', '1001'])
    """
    first_row = torch.repeat_interleave(
        row_offsets[:-1], row_offsets.diff().long(), output_size=parents.numel()
    )
    row = torch.arange(parents.numel(), device=parents.device) - first_row
    ancestors = torch.ones_like(row, dtype=torch.int64) << row
    depths = (parents >= 0).int()
    # The root points at itself: merging with it again changes nothing.
    pointer = parents.clamp(min=0) + first_row
    for _ in range((max_rows - 1).bit_length()):
        ancestors = ancestors | ancestors[pointer]
        depths = depths + depths[pointer]
        pointer = pointer[pointer]
    return depths, ancestors
