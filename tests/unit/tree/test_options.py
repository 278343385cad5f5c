# SPDX-License-Identifier: Apache-2.0
"""Options: defaults, ranges, refusals."""

import pydantic
import pytest

from vllm_clover2.tree import DynamicTree, TreeOptions, chain, paper_tree


def test_default_is_a_dynamic_tree_of_25_nodes() -> None:
    options = TreeOptions()
    assert options.dynamic_tree() == DynamicTree(25, top_k=8, depth=5, top_p=1.0)
    assert options.max_depth == options.context_depth == 16


def test_without_context_the_head_alone_gives_the_depth() -> None:
    options = TreeOptions(context=False)
    assert options.context_limits() is None
    assert options.max_depth == 5
    assert TreeOptions(num_speculative_tokens=7).max_depth == 7
    assert TreeOptions(depth=20).max_depth == 20


@pytest.mark.parametrize(
    ("given", "nodes"),
    [({}, 5), ({"depth": 7}, 7), ({"num_speculative_tokens": 3}, 3)],
    ids=["default", "depth", "nodes"],
)
def test_chain_is_a_dynamic_tree_with_one_node_a_level(given, nodes) -> None:
    options = TreeOptions(tree="chain", **given)
    assert options.num_nodes == options.max_depth == nodes
    assert options.dynamic_tree() == DynamicTree(nodes, top_k=1, depth=nodes)


@pytest.mark.parametrize(
    ("given", "nodes", "shape"),
    [
        ({"tree": "static"}, 25, paper_tree()),
        ({"tree": "static", "num_speculative_tokens": 8}, 8, paper_tree().first(8)),
        ({"tree": [[0], [0, 0]]}, 2, chain(2)),
    ],
    ids=["static", "static-8", "paths"],
)
def test_static_shapes(given, nodes, shape) -> None:
    options = TreeOptions(**given)
    assert options.num_nodes == nodes
    assert options.static_shape() == shape
    assert options.max_depth == shape.depth


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"topk": 4}, "topk"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 64}, "num_speculative_tokens"),
        ({"tree": "static", "num_speculative_tokens": 26}, "at most the tree's 25"),
        ({"tree": [[0, 0]]}, "parent of path"),
        ({"tree": "beam"}, "dynamic"),
        (
            {
                "top_k": 2,
                "depth": 2,
                "num_speculative_tokens": 7,
                "context": False,
            },
            "at most 6",
        ),
        ({"context_min_match": 9, "context_max_match": 8}, "must not exceed"),
        ({"context_depth": 64}, "context_depth"),
        ({"top_p": 0.0}, "top_p"),
        ({"depth": 0}, "depth"),
    ],
    ids=["unknown", "none", "many", "static", "paths", "name", "few"]
    + ["matches", "context_depth", "top_p", "depth"],
)
def test_refused(given, message) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        TreeOptions(**given)


def test_wrong_kind_of_tree() -> None:
    with pytest.raises(ValueError, match="no fixed shape"):
        TreeOptions().static_shape()
    with pytest.raises(ValueError, match="no fixed shape"):
        TreeOptions(tree="chain").static_shape()
    with pytest.raises(ValueError, match="must be"):
        TreeOptions(tree="static").dynamic_tree()
