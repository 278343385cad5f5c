# SPDX-License-Identifier: Apache-2.0
"""One level of the walk that accepts tokens."""

import torch

from vllm_clover2.tree import TreeBatch, first_matching_child, request_of_row


def step(batch: TreeBatch, nodes: list[int], tokens: list[int]) -> list[int]:
    children = first_matching_child(
        torch.tensor(nodes, dtype=torch.int32),
        torch.tensor(tokens),
        batch.tokens,
        batch.parents,
        batch.row_offsets,
        request_of_row(batch.row_offsets),
    )
    assert children.dtype == torch.int32
    return children.tolist()


def test_drawn_tree(drawn_tree) -> None:
    batch = TreeBatch.from_lists([[*drawn_tree.tokens]], [[*drawn_tree.parents]])
    assert step(batch, [0], [6]) == [2]
    assert step(batch, [0], [7]) == [-1]  # a grandchild's token
    assert step(batch, [1], [7]) == [3]  # of siblings with one token the first
    assert step(batch, [4], [8]) == [-1]  # 8 hangs below the other sibling
    assert step(batch, [6], [8]) == [-1]  # a leaf


def test_stopped_requests_stay_stopped(drawn_tree) -> None:
    batch = TreeBatch.from_lists([[*drawn_tree.tokens]], [[*drawn_tree.parents]])
    # The root has token and parent -1: neither may match.
    assert step(batch, [-1], [-1]) == [-1]
    assert step(batch, [-1], [5]) == [-1]


def test_requests_do_not_mix(random_trees) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [
        torch.randint(0, 3, (len(tree),), generator=generator).tolist()
        for tree in random_trees
    ]
    batch = TreeBatch.from_lists(tokens, random_trees)
    nodes = [
        int(torch.randint(-1, len(tree) + 1, (), generator=generator))
        for tree in random_trees
    ]
    picked = [request % 3 for request in range(len(random_trees))]
    expected = [
        next(
            (
                row
                for row, (parent, token) in enumerate(zip(tree, own), start=1)
                if node >= 0 and parent == node and token == pick
            ),
            -1,
        )
        for tree, own, node, pick in zip(random_trees, tokens, nodes, picked)
    ]
    assert step(batch, nodes, picked) == expected
