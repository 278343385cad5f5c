# SPDX-License-Identifier: Apache-2.0
"""Accepting against a search over all paths of each tree."""

import pytest
import torch
from paging import random_batch

from vllm_clover2.tree import TreeBatch


def all_paths(parents: list[int]) -> list[list[int]]:
    """Every path of rows from the root, the root left out."""
    paths: list[list[int]] = [[]]
    for row, parent in enumerate(parents, start=1):
        below = next(path for path in paths if (path or [0])[-1] == parent)
        paths.append([*below, row])
    return paths


def accepted(
    parents: list[int], draft: list[int], target: list[int], max_depth: int
) -> tuple[list[int], int]:
    """The longest path on which every row is the first child with the target's token.

    `parents` are the nodes' only, `draft` and `target` include the root.
    """

    def first_child(above: int) -> int | None:
        children = [row for row, parent in enumerate(parents, 1) if parent == above]
        same = [row for row in children if draft[row] == target[above]]
        return min(same, default=None)

    def followed(path: list[int]) -> bool:
        return len(path) <= max_depth and all(
            row == first_child(above) for above, row in zip([0, *path], path)
        )

    best = max((path for path in all_paths(parents) if followed(path)), key=len)
    return best, target[(best or [0])[-1]]


def run(run_op, batch: TreeBatch, target: torch.Tensor, max_depth: int):
    paths, lengths, next_tokens = run_op(
        "tree_accept",
        target_tokens=target,
        draft_tokens=batch.tokens,
        parents=batch.parents,
        row_offsets=batch.row_offsets,
        max_depth=max_depth,
    )
    assert paths.dtype == lengths.dtype == torch.int32
    assert next_tokens.dtype == torch.int64
    return paths.tolist(), lengths.tolist(), next_tokens.tolist()


@pytest.mark.parametrize("max_depth", [0, 1, 3, 63])
@pytest.mark.parametrize("vocabulary", [1, 2, 4])
def test_longest_followed_path(run_op, vocabulary, max_depth) -> None:
    """A small vocabulary: siblings often carry the same token."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows = [1, 2, 64, 26, 9, 5, 1, 33]
    batch = random_batch(rows, generator)
    drafted = torch.randint(0, vocabulary, (batch.num_rows,), generator=generator)
    batch.tokens.copy_(torch.where(batch.parents < 0, -1, drafted))
    target = torch.randint(0, vocabulary, (batch.num_rows,), generator=generator)
    paths, lengths, next_tokens = run(run_op, batch, target, max_depth)
    for request in range(batch.num_requests):
        first, end = batch.row_offsets[request : request + 2].tolist()
        path, following = accepted(
            batch.parents[first + 1 : end].tolist(),
            batch.tokens[first:end].tolist(),
            target[first:end].tolist(),
            max_depth,
        )
        assert lengths[request] == len(path)
        assert paths[request] == path + [-1] * (max_depth - len(path))
        assert next_tokens[request] == following


def test_first_of_equal_siblings_wins(run_op) -> None:
    """Though the second one would lead farther."""
    batch = TreeBatch.from_lists([[5, 5, 6]], [[0, 0, 2]])
    paths, lengths, next_tokens = run(run_op, batch, torch.tensor([5, 6, 6, 9]), 3)
    assert (paths, lengths, next_tokens) == ([[1, -1, -1]], [1], [6])


def test_no_requests(run_op) -> None:
    batch = TreeBatch.from_lists([], [])
    paths, lengths, next_tokens = run(run_op, batch, torch.zeros(0).long(), 5)
    assert (paths, lengths, next_tokens) == ([], [], [])


def test_request_without_rows(run_op) -> None:
    paths, lengths, next_tokens = run_op(
        "tree_accept",
        target_tokens=torch.tensor([4]),
        draft_tokens=torch.tensor([-1]),
        parents=torch.tensor([-1], dtype=torch.int32),
        row_offsets=torch.tensor([0, 0, 1], dtype=torch.int32),
        max_depth=2,
    )
    assert paths.tolist() == [[-1, -1], [-1, -1]]
    assert lengths.tolist() == [0, 0]
    assert next_tokens.tolist() == [-1, 4]
