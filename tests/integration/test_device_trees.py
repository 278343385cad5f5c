# SPDX-License-Identifier: Apache-2.0
"""Trees that are kept on the device: padding, chains, and the rows of a step's text."""

import torch

from vllm_clover2.integration.step import rows_of_text
from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.types import GrownTrees, TreeBatch

# Two trees, the first as drawn (in brackets the rows), the second of one node.
#
#     root - 5 (1) - 7 (3) - 9 (4)
#         \- 6 (2)
TOKENS = torch.tensor([[5, 6, 7, 9], [8, -1, -1, -1]])
PARENTS = torch.tensor([[0, 0, 1, 3], [0, 0, 0, 0]], dtype=torch.int32)
DEPTHS = torch.tensor([[1, 1, 2, 3], [1, 0, 0, 0]], dtype=torch.int32)
SIZES = torch.tensor([4, 1], dtype=torch.int32)
TREES = GrownTrees(
    TOKENS,
    PARENTS,
    DEPTHS,
    torch.zeros(2, 4),
    SIZES,
    torch.zeros(2, 4, dtype=torch.int8),
)
SLOTS = torch.tensor([3, 1])


def all_rows(trees: DeviceTrees) -> tuple[torch.Tensor, torch.Tensor]:
    """Slot and number of every row of both requests."""
    numbers = torch.arange(1 + trees.num_nodes).repeat(2)
    slots = SLOTS.repeat_interleave(1 + trees.num_nodes)
    return slots, numbers


def test_trees_are_kept_by_slot() -> None:
    trees = DeviceTrees(5, num_nodes=6, max_depth=3, device=torch.device("cpu"))
    tokens = trees.put(SLOTS, TREES)
    assert tokens.tolist() == [[5, 6, 7, 9, 0, 0], [8, 0, 0, 0, 0, 0]]
    rows = trees.rows(*all_rows(trees))
    expected = TreeBatch.from_padded(TOKENS, PARENTS, SIZES)
    drafted = rows.drafted.view(2, 7)
    assert drafted.sum(dim=1).tolist() == SIZES.tolist()
    known = drafted.clone()
    known[:, 0] = True
    known = known.flatten()
    assert torch.equal(rows.parents[known], expected.parents)
    assert torch.equal(rows.depths[known], expected.depths)
    assert torch.equal(rows.ancestors[known], expected.ancestors)
    # Padding sees the root and itself: what it computes is finite.
    assert rows.parents[~known].unique().tolist() == [0]
    assert rows.ancestors.view(2, 7)[1].tolist() == [
        1,
        *(1 + 2**n for n in range(1, 7)),
    ]


def test_some_requests_get_chains() -> None:
    trees = DeviceTrees(5, num_nodes=4, max_depth=3, device=torch.device("cpu"))
    tokens = trees.put(SLOTS, TREES, chains=torch.tensor([True, False]))
    assert tokens.tolist() == [[5, 7, 9, 0], [8, 0, 0, 0]]
    rows = trees.rows(*all_rows(trees))
    assert rows.parents.view(2, 5)[0].tolist() == [-1, 0, 1, 2, 0]
    assert rows.drafted.view(2, 5).sum(dim=1).tolist() == [3, 1]


def test_a_slot_without_a_tree_has_a_root() -> None:
    trees = DeviceTrees(2, num_nodes=2, max_depth=1, device=torch.device("cpu"))
    rows = trees.rows(torch.tensor([0]), torch.tensor([0]))
    assert [part.tolist() for part in rows] == [[-1], [0], [1], [False]]


def test_rows_of_text() -> None:
    """A request in its prompt, and one with nodes 2 and 5 of its tree accepted."""
    requests = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    rows = rows_of_text(
        requests,
        places,
        first_rows=torch.tensor([10, 20]),
        root_rows=torch.tensor([12, 20]),
        paths=torch.tensor([[-1, -1, -1], [2, 5, -1]], dtype=torch.int32),
    )
    assert rows.tolist() == [10, 11, 12, 20, 22, 25, 20]


def test_rows_of_text_without_trees() -> None:
    rows = rows_of_text(
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        first_rows=torch.tensor([0, 1]),
        root_rows=torch.tensor([0, 1]),
        paths=torch.empty(2, 0, dtype=torch.int32),
    )
    assert rows.tolist() == [0, 1]
