# SPDX-License-Identifier: Apache-2.0
"""Assembly of flat batches."""

import pytest
import torch

from vllm_clover2.tree import TreeBatch

TENSORS = ("row_offsets", "tokens", "parents", "depths", "ancestors")


def padded(trees: list[list[int]], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and parents [R, width]; tokens tell request and node, padding is junk."""
    tokens = torch.full((len(trees), width), 12345)
    parents = torch.full((len(trees), width), 99, dtype=torch.int32)
    for request, tree in enumerate(trees):
        tokens[request, : len(tree)] = torch.arange(len(tree)) + 100 * request
        parents[request, : len(tree)] = torch.tensor(tree, dtype=torch.int32)
    return tokens, parents


def test_padded_and_lists_agree(random_trees) -> None:
    width = max(len(tree) for tree in random_trees)
    tokens, parents = padded(random_trees, width)
    sizes = torch.tensor([len(tree) for tree in random_trees])
    from_padded = TreeBatch.from_padded(tokens, parents, sizes)
    lists = [row[: len(tree)].tolist() for row, tree in zip(tokens, random_trees)]
    from_lists = TreeBatch.from_lists(lists, random_trees)
    for name in TENSORS:
        assert torch.equal(getattr(from_padded, name), getattr(from_lists, name)), name
        assert getattr(from_padded, name).dtype == getattr(from_lists, name).dtype


def test_trimmed_tree_is_the_prefix(random_trees) -> None:
    width = max(len(tree) for tree in random_trees)
    tokens, parents = padded(random_trees, width)
    keep = torch.tensor([len(tree) // 2 for tree in random_trees])
    trimmed = TreeBatch.from_padded(tokens, parents, keep)
    shorter = [tree[: len(tree) // 2] for tree in random_trees]
    expected = TreeBatch.from_padded(*padded(shorter, width), keep)
    for name in TENSORS:
        assert torch.equal(getattr(trimmed, name), getattr(expected, name)), name


def test_root_rows() -> None:
    batch = TreeBatch.from_lists([[], [8], []], [[], [0], []])
    assert batch.num_requests == 3
    assert batch.row_offsets.tolist() == [0, 1, 3, 4]
    assert batch.tokens.tolist() == [-1, -1, 8, -1]
    assert batch.parents.tolist() == [-1, -1, 0, -1]
    assert batch.ancestors.tolist() == [1, 1, 3, 1]


def test_no_requests() -> None:
    empty = torch.zeros(0, 4)
    batch = TreeBatch.from_padded(empty.long(), empty.int(), torch.zeros(0).long())
    assert batch.num_requests == 0
    assert batch.num_rows == 0


@pytest.mark.parametrize(
    ("tokens", "parents", "message"),
    [
        ([[1, 2]], [[0, 2]], "parent of row 2"),
        ([[1]], [[-1]], "parent of row 1"),
        ([[1, 2]], [[0]], "one parent"),
        ([[1] * 64], [[0] * 64], "at most 63"),
    ],
    ids=["child-first", "no-root", "missing", "too-many"],
)
def test_lists_that_are_no_trees(tokens, parents, message) -> None:
    with pytest.raises(ValueError, match=message):
        TreeBatch.from_lists(tokens, parents)
