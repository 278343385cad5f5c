# SPDX-License-Identifier: Apache-2.0
"""Growing trees against a search over single paths."""

import dataclasses
import math
from math import log

import pytest
import torch
from scoring_draft import ScoringDraft

from vllm_clover2.tree import (
    DynamicTree,
    TreeBatch,
    TreeShape,
    chain,
    grow_dynamic,
    grow_static,
    paper_tree,
)


def distribution(draft, hidden, path):
    """Log-probabilities after a path of tokens of one request, without batching."""
    state, log_probs = draft.first(hidden[None])
    for token in path:
        state, log_probs = draft.advance(state, torch.tensor([token]))
    return log_probs[0]


def ranked_children(draft, hidden, path, count):
    """(token, log-probability) of the likeliest children of a path."""
    log_probs = distribution(draft, hidden, path)
    order = sorted(range(len(log_probs)), key=lambda i: -log_probs[i].item())[:count]
    return [(int(draft.ids[i]), log_probs[i].item()) for i in order]


def kept_children(draft, hidden, path, tree):
    """The children that Clover-1's token rule keeps."""
    kept, mass = [], 0.0
    children = ranked_children(draft, hidden, path, tree.top_k)
    for token, log_prob in children:
        likely = math.exp(log_prob) >= tree.min_ratio * math.exp(children[0][1])
        if kept and not (likely and (mass < tree.top_p or tree.top_p == 1.0)):
            break
        kept.append((token, log_prob))
        mass += math.exp(log_prob)
    return kept


def best_paths(draft, hidden, tree):
    """{path: joint log-probability} of the best nodes, by searching path by path."""
    found, level = {}, {(): 0.0}
    for _ in range(tree.depth):
        below = {
            (*path, token): joint + log_prob
            for path, joint in level.items()
            for token, log_prob in kept_children(draft, hidden, path, tree)
        }
        found |= below
        best = sorted(below, key=lambda path: -below[path])[: tree.top_k]
        level = {path: below[path] for path in best}
    best = sorted(found, key=lambda path: -found[path])[: tree.num_nodes]
    return {path: found[path] for path in best}


def paths_of(grown, request):
    """{path of tokens: joint} of a grown tree, in row order."""
    paths, result = [()], {}
    for node in range(int(grown.sizes[request])):
        parent = int(grown.parents[request, node])
        assert parent <= node  # rows: node i is row i + 1
        path = (*paths[parent], int(grown.tokens[request, node]))
        assert len(path) == int(grown.depths[request, node])
        paths.append(path)
        result[path] = grown.joint[request, node].item()
    assert len(result) == len(paths) - 1  # no path twice
    return result


@pytest.mark.parametrize(
    "tree",
    [
        DynamicTree(25),
        DynamicTree(63, top_k=4, depth=6),
        DynamicTree(9, top_p=0.6, min_ratio=0.1),
        DynamicTree(12, top_k=1, depth=12),
        DynamicTree(5, depth=1),
        DynamicTree(40, min_ratio=0.25),
    ],
    ids=["default", "large", "top-p", "chain", "one-level", "quarter-rule"],
)
def test_dynamic_tree_is_the_best(toy_draft, hidden, tree) -> None:
    grown = grow_dynamic(toy_draft, hidden, tree)
    for request in range(len(hidden)):
        expected = best_paths(toy_draft, hidden[request], tree)
        actual = paths_of(grown, request)
        assert list(actual) == list(expected)
        assert list(actual.values()) == pytest.approx(list(expected.values()), abs=1e-5)


def test_dynamic_prefixes_are_the_best_smaller_trees(toy_draft, hidden) -> None:
    whole = grow_dynamic(toy_draft, hidden, DynamicTree(25))
    for nodes in (1, 7, 24):
        cut = grow_dynamic(toy_draft, hidden, DynamicTree(nodes))
        for name in ("tokens", "parents", "depths", "joint"):
            assert torch.equal(getattr(cut, name), getattr(whole, name)[:, :nodes])


def test_padding_after_the_last_node(toy_draft, hidden) -> None:
    grown = grow_dynamic(toy_draft, hidden, DynamicTree(63, min_ratio=0.9))
    assert grown.sizes.min() < 63
    for request, size in enumerate(grown.sizes.tolist()):
        assert torch.all(grown.tokens[request, size:] == -1)
        assert torch.all(grown.parents[request, size:] == 0)
        assert torch.all(grown.joint[request, size:] == -torch.inf)
    batch = TreeBatch.from_padded(grown.tokens, grown.parents, grown.sizes)
    assert batch.num_rows == int(grown.sizes.sum()) + len(hidden)
    valid = [row[:size] for row, size in zip(grown.depths, grown.sizes)]
    expected = torch.cat([torch.cat((torch.zeros(1).int(), row)) for row in valid])
    assert torch.equal(batch.depths, expected)


class CertainDraft(ScoringDraft):
    """Every node has a child of probability 1: all joint probabilities are equal."""

    def first(self, hidden):
        log_probs = torch.full((len(hidden), 6), -torch.inf)
        log_probs[:, 3] = 0.0
        return hidden, log_probs

    def advance(self, state, tokens):
        return self.first(state)

    def token_ids(self, draft_ids):
        return draft_ids


def test_equal_probabilities_keep_parents_first() -> None:
    grown = grow_dynamic(CertainDraft(), torch.zeros(2, 4), DynamicTree(10, depth=7))
    assert grown.sizes.tolist() == [7, 7]
    assert grown.parents[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert grown.depths[0, :7].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_figure_of_the_token_rule() -> None:
    """The Clover-1 figure: top-p 0.8 keeps two of .5 .3 .1 .05 .05."""

    class Figure(CertainDraft):
        def first(self, hidden):
            probs = torch.tensor([0.5, 0.3, 0.1, 0.05, 0.05])
            return hidden, probs.log().expand(len(hidden), -1)

    tree = DynamicTree(5, top_k=5, depth=1, top_p=0.79)
    grown = grow_dynamic(Figure(), torch.zeros(1, 4), tree)
    assert grown.tokens[0, : grown.sizes[0]].tolist() == [0, 1]


@pytest.mark.parametrize(
    "shape",
    [
        paper_tree(),
        chain(1),
        chain(7),
        TreeShape.from_paths([[2], [0], [2, 1], [2, 1, 0], [0, 3]]),
    ],
    ids=["paper", "one", "chain", "gaps"],
)
def test_static_tree_takes_the_ranks_of_its_paths(toy_draft, hidden, shape) -> None:
    grown = grow_static(toy_draft, hidden, shape)
    assert grown.sizes.tolist() == [shape.num_nodes] * len(hidden)
    for request in range(len(hidden)):
        expected = {}
        for ranks in shape.paths:
            path, joint = (), 0.0
            for rank in ranks:
                children = ranked_children(toy_draft, hidden[request], path, rank + 1)
                path, joint = (*path, children[rank][0]), joint + children[rank][1]
            expected[path] = joint
        actual = paths_of(grown, request)
        assert list(actual) == list(expected)
        assert list(actual.values()) == pytest.approx(list(expected.values()), abs=1e-5)


def test_no_requests(toy_draft, hidden) -> None:
    for grown in (
        grow_dynamic(toy_draft, hidden[:0], DynamicTree(25)),
        grow_static(toy_draft, hidden[:0], paper_tree()),
    ):
        assert grown.tokens.shape == (0, 25)
        assert grown.sizes.numel() == 0


def test_growth_stops_below_a_level_with_too_little_mass(toy_draft, hidden) -> None:
    """With the limit just above a level's mass its nodes have no children."""
    whole = grow_dynamic(toy_draft, hidden, DynamicTree(63, top_k=3, depth=4))
    first_level = whole.joint.masked_fill(whole.depths != 1, -math.inf)
    mass = float(first_level.exp().sum())

    def deepest(limit: float) -> int:
        tree = DynamicTree(63, top_k=3, depth=4, min_level_mass=limit)
        return int(grow_dynamic(toy_draft, hidden, tree).depths.max())

    assert deepest(mass * 1.001) == 1
    assert deepest(mass * 0.999) > 1
    assert deepest(0.0) == 4


class CountingDraft(ScoringDraft):
    """Counts the nodes that get children."""

    def __init__(self, draft) -> None:
        self.draft, self.expanded = draft, 0
        self.first, self.token_ids = draft.first, draft.token_ids

    def advance(self, state, tokens):
        self.expanded += len(tokens)
        return self.draft.advance(state, tokens)


@pytest.mark.parametrize("least", [0.02, 0.1, 0.3])
def test_only_likely_nodes_get_children(toy_draft, hidden, least) -> None:
    """The nodes that remain likely enough are those of the whole tree."""
    limits = DynamicTree(63, top_k=4, depth=5)
    whole = grow_dynamic(toy_draft, hidden, limits)
    counting = CountingDraft(toy_draft)
    limits = dataclasses.replace(limits, min_expanded=1e-6)
    pruned = grow_dynamic(counting, hidden, limits.without_nodes_below(least))

    likely = 0
    for request in range(len(hidden)):
        wanted, found = paths_of(whole, request), paths_of(pruned, request)
        wanted = {path: joint for path, joint in wanted.items() if joint > log(least)}
        assert list(found)[: len(wanted)] == list(wanted)
        for path in found:
            assert len(path) == 1 or found[path[:-1]] >= log(least)
        for depth in range(1, limits.depth):
            level = sum(len(path) == depth for path in wanted)
            likely += min(level, limits.top_k)
    assert counting.expanded == likely


def test_width_follows_the_least_probability() -> None:
    tree = DynamicTree(25, top_k=8, min_expanded=0.01)
    widths = {p: tree.without_nodes_below(p).top_k for p in (0.0, 0.1, 0.3, 0.5, 0.9)}
    assert widths == {0.0: 8, 0.1: 8, 0.3: 3, 0.5: 2, 0.9: 1}
    assert tree.without_nodes_below(0.3).min_expanded == 0.3
    # Where looking would wait for the device, the width alone follows.
    assert DynamicTree(25).without_nodes_below(0.3).min_expanded == 0.0


def test_a_level_without_likely_nodes_gets_no_children(toy_draft, hidden) -> None:
    counting = CountingDraft(toy_draft)
    grown = grow_dynamic(counting, hidden, DynamicTree(25, min_expanded=0.999))
    assert counting.expanded == 0
    assert int(grown.depths.max()) == 1
