# SPDX-License-Identifier: Apache-2.0
"""One level of the walk that accepts drafted tokens."""

import torch


def request_of_row(
    row_offsets: torch.Tensor,  # [R + 1] int32
) -> torch.Tensor:
    """The request [rows] int64 that owns each row of a flat batch."""
    sizes = row_offsets.diff().long()
    return torch.repeat_interleave(
        torch.arange(sizes.numel(), device=sizes.device), sizes
    )


def first_matching_child(
    nodes: torch.Tensor,  # [R] int32, current row of each request; -1: stopped
    tokens: torch.Tensor,  # [R] int64, what the target picked after that row
    draft_tokens: torch.Tensor,  # [rows] int64
    parents: torch.Tensor,  # [rows] int32, root: -1
    row_offsets: torch.Tensor,  # [R + 1] int32
    row_request: torch.Tensor,  # [rows] int64, see request_of_row
) -> torch.Tensor:
    """The child row [R] int32 that carries the picked token, -1 if there is none.

    Of siblings with the same token the first in row order is taken, so a row is
    reached by exactly one history of picks. Stopped requests stay stopped.
    """
    # A stopped request's -1 would match the root's parent, -1: compare with -2.
    at = torch.where(nodes < 0, -2, nodes)[row_request]
    matches = (parents == at) & (draft_tokens == tokens[row_request])
    rows = torch.arange(parents.numel(), dtype=torch.int32, device=parents.device)
    rows -= row_offsets[row_request]
    beyond = torch.iinfo(torch.int32).max
    child = torch.full_like(nodes, beyond).scatter_reduce(
        0, row_request, torch.where(matches, rows, beyond), "amin"
    )
    return torch.where(child == beyond, -1, child)
