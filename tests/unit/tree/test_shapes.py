# SPDX-License-Identifier: Apache-2.0
"""Static shapes."""

import json

import pytest
from golden_cases import GOLDEN

from vllm_clover2.tree import TreeShape, chain, paper_tree


def test_paper_tree_has_25_nodes_and_depth_5() -> None:
    shape = paper_tree()
    assert shape.num_nodes == 25
    assert shape.depth == 5


def test_paper_tree_is_the_reference_tree() -> None:
    golden = json.loads((GOLDEN / "static_tree.json").read_text())
    shape = paper_tree()
    assert [list(path) for path in shape.paths] == golden["paths_as_listed"]
    assert list(shape.parents) == golden["node_parent"][1:]


def test_chain() -> None:
    assert chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert chain(3).parents == (0, 1, 2)


def test_paths_may_come_in_any_order() -> None:
    shape = TreeShape.from_paths([[1, 0], [0], [1], [0, 2]])
    assert shape.paths == ((0,), (1,), (0, 2), (1, 0))
    assert shape.parents == (0, 0, 1, 2)


@pytest.mark.parametrize("nodes", [1, 4, 24, 25])
def test_every_prefix_is_a_tree(nodes: int) -> None:
    cut = paper_tree().first(nodes)
    assert cut.num_nodes == nodes
    assert TreeShape.from_paths(cut.paths) == cut


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], "1 to 63 nodes"),
        ([[rank] for rank in range(64)], "1 to 63 nodes"),
        ([[0, 0]], r"parent of path \[0, 0\]"),
        ([[0], [0]], "listed once"),
        ([[0], [-1]], "ranks from 0"),
        ([[]], "non-empty"),
        ([[0], [True]], "ranks from 0"),
    ],
    ids=["empty", "large", "orphan", "twice", "negative", "root", "bool"],
)
def test_lists_that_are_no_trees(paths, message) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape.from_paths(paths)


@pytest.mark.parametrize("nodes", [0, 26])
def test_cut_beyond_the_tree(nodes: int) -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens"):
        paper_tree().first(nodes)
