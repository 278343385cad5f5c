# SPDX-License-Identifier: Apache-2.0
"""Depths and ancestor masks against the definition."""

import torch

from vllm_clover2.tree import TreeBatch, depths_and_ancestors


def ancestors_by_walking(parents: list[int], row: int) -> list[int]:
    """The rows from the root to `row`, by following parents."""
    path = [row]
    while path[0] > 0:
        path.insert(0, parents[path[0] - 1])
    return path


def rows_of_word(word: int) -> list[int]:
    return [row for row in range(64) if word >> row & 1]


def test_drawn_tree(drawn_tree) -> None:
    batch = TreeBatch.from_lists([[*drawn_tree.tokens]], [[*drawn_tree.parents]])
    assert batch.depths.tolist() == list(drawn_tree.depths)
    rows = [tuple(rows_of_word(word)) for word in batch.ancestors.tolist()]
    assert rows == list(drawn_tree.ancestor_rows)


def test_mask_is_the_ancestor_relation(random_trees) -> None:
    batch = TreeBatch.from_lists(
        [[1] * len(tree) for tree in random_trees], random_trees
    )
    row = 0
    for parents in random_trees:
        for local in range(len(parents) + 1):
            expected = ancestors_by_walking(parents, local)
            # Bit 63 makes the word negative; Python's >> keeps the sign.
            word = int(batch.ancestors[row]) & (2**64 - 1)
            assert rows_of_word(word) == expected
            assert int(batch.depths[row]) == len(expected) - 1
            row += 1
    assert row == batch.num_rows


def test_longest_chain() -> None:
    parents = torch.arange(-1, 63, dtype=torch.int32)
    offsets = torch.tensor([0, 64], dtype=torch.int32)
    depths, ancestors = depths_and_ancestors(parents, offsets, 64)
    assert depths.tolist() == list(range(64))
    assert [int(word) & (2**64 - 1) for word in ancestors] == [
        2 ** (row + 1) - 1 for row in range(64)
    ]


def test_no_requests() -> None:
    empty = torch.zeros(0, dtype=torch.int32)
    depths, ancestors = depths_and_ancestors(empty, torch.zeros(1).int(), 1)
    assert depths.numel() == 0
    assert ancestors.numel() == 0
