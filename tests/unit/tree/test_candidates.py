# SPDX-License-Identifier: Apache-2.0
"""One pool of two sources against a search over single paths."""

import math

import pytest
import torch
from candidate_pools import judged
from scoring_draft import ToyDraft

from vllm_clover2.tree import (
    DynamicTree,
    GrownTrees,
    Source,
    TreeGrower,
    TreeOptions,
    check_parents,
)
from vllm_clover2.tree.candidates import CandidatePool
from vllm_clover2.tree.context import ContextCandidates
from vllm_clover2.tree.grower import likeliest_chains
from vllm_clover2.tree.growth import ask_draft

Path = tuple[int, ...]


def trie_of(
    context: ContextCandidates, request: int
) -> dict[Path, tuple[float, float]]:
    """{path: (alone, beside)}"""
    nodes, paths, found = context.nodes, [()], {}
    for node in range(int(nodes.sizes[request])):
        parent = paths[int(nodes.parents[request, node])]
        path = (*parent, int(nodes.tokens[request, node]))
        paths.append(path)
        found[path] = (
            float(context.alone[request, node]),
            float(context.beside[request, node]),
        )
    return found


def expected_pool(draft, hidden, trie, tree) -> dict[Path, float]:
    """{path: joint probability} of all candidates of one request."""
    joint: dict[Path, float] = {(): 1.0}
    asked: set[Path] = set()
    level: list[Path] = [()]
    for _ in range(tree.depth):
        below: dict[Path, float] = {}
        for path in level:
            asked.add(path)
            state, children = draft.first_top_k(hidden[None], tree.top_k)
            for token in path:
                state, children = draft.advance_top_k(
                    state, torch.tensor([token]), tree.top_k
                )
            head = dict(
                zip(
                    children.tokens[0].tolist(),
                    children.values[0].exp().tolist(),
                    strict=True,
                )
            )
            text = {p[-1]: w for p, (_, w) in trie.items() if p[:-1] == path}
            left = 1.0 - sum(text.values())
            for token in head | text:
                share = text.get(token, 0.0) + left * head.get(token, 0.0)
                below[*path, token] = joint[path] * share
        joint |= below
        level = sorted(below, key=lambda path: -below[path])[: tree.top_k]
    for path in sorted(trie, key=len):
        if path[:-1] not in asked:
            joint[path] = joint[path[:-1]] * trie[path][0]
    del joint[()]
    return joint


def paths_of(trees: GrownTrees, request: int) -> list[Path]:
    """Paths in row order; checks what every prefix being a tree needs."""
    size = int(trees.sizes[request])
    check_parents(trees.parents[request, :size].tolist(), size, "the tree")
    paths: list[Path] = [()]
    for node in range(size):
        parent = paths[int(trees.parents[request, node])]
        paths.append((*parent, int(trees.tokens[request, node])))
        assert len(paths[-1]) == int(trees.depths[request, node])
    assert len(set(paths)) == len(paths)  # no path twice
    joint = trees.joint[request, :size]
    assert torch.equal(joint, joint.sort(descending=True).values)
    return paths[1:]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("vocabulary", [40, 2])  # with 2 a level may lack candidates
@pytest.mark.parametrize(
    "tree",
    [DynamicTree(63), DynamicTree(25, top_k=3, depth=2), DynamicTree(40, top_k=2)],
    ids=["wide", "shallow", "narrow"],
)
def test_pool_is_that_of_a_search_by_paths(hidden, vocabulary, tree, seed) -> None:
    toy_draft = ToyDraft(vocabulary)
    context = judged(len(hidden), 40, seed)
    pool = CandidatePool(context, tree.num_candidates)
    ask_draft(pool, toy_draft, hidden, tree)
    trees = pool.best(tree.num_nodes)
    for request in range(len(hidden)):
        trie = trie_of(context, request)
        wanted = expected_pool(toy_draft, hidden[request], trie, tree)
        found = dict(
            zip(
                paths_of(trees, request),
                trees.joint[request].exp().tolist(),
                strict=False,
            )
        )
        best = sorted(wanted.values(), reverse=True)[: tree.num_nodes]
        # Logs lie on a grid of 2^-12.
        assert list(found.values()) == pytest.approx(best, rel=5e-3)
        for path, joint in found.items():
            assert joint == pytest.approx(wanted[path], rel=5e-3), path
            source = trees.sources[request, list(found).index(path)]
            assert (source == Source.HEAD) == (path not in trie)


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_is_the_best_tree_of_its_size(toy_draft, hidden, seed) -> None:
    """Topological order, whatever the sources; smaller trees are prefixes."""
    grower = TreeGrower(TreeOptions(num_speculative_tokens=63))
    context = judged(len(hidden), 64, seed)
    whole = grower.grow(toy_draft, hidden, context).trees
    for request in range(len(hidden)):
        paths_of(whole, request)
    smaller = TreeGrower(TreeOptions(num_speculative_tokens=9))
    cut = smaller.grow(toy_draft, hidden, context).trees
    for name in ("tokens", "parents", "depths", "joint", "sources"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[:, :9]), name
    assert set(whole.sources[whole.depths > 0].tolist()) >= {
        Source.HEAD,
        Source.CONTEXT,
    }


def test_without_a_head_the_text_alone_gives_the_tree() -> None:
    context = judged(4, 40, seed=3)
    growth = TreeGrower(TreeOptions(num_speculative_tokens=20)).grow(
        None, torch.zeros(4, 1), context
    )
    for request in range(4):
        trie = trie_of(context, request)
        paths = paths_of(growth.trees, request)
        assert len(paths) == min(20, len(trie))
        for path, joint in zip(paths, growth.trees.joint[request], strict=False):
            wanted = math.prod(trie[path[:n]][0] for n in range(1, len(path) + 1))
            assert float(joint.exp()) == pytest.approx(wanted, rel=5e-3)
    assert (growth.levels, growth.asked) == (0, 0)


def test_only_those_are_asked_for_who_shall_be(toy_draft, hidden) -> None:
    grower = TreeGrower(TreeOptions())
    context = judged(len(hidden), 30, seed=5)
    ask = torch.tensor([True, False, False, True, False])
    limits = DynamicTree(25, min_expanded=1e-9)
    some = grower.grow(toy_draft, hidden, context, ask, limits).trees
    everyone = grower.grow(toy_draft, hidden, context, None, limits).trees
    nobody = grower.grow(None, hidden, context, None, limits).trees
    for request, asked in enumerate(ask.tolist()):
        like = everyone if asked else nobody
        size = int(some.sizes[request])
        assert size == int(like.sizes[request])
        for name in ("tokens", "parents", "sources"):
            ours, theirs = getattr(some, name), getattr(like, name)
            assert torch.equal(ours[request, :size], theirs[request, :size]), name


def test_a_chain_follows_the_likeliest_children(toy_draft, hidden) -> None:
    options = TreeOptions(tree="chain", num_speculative_tokens=6)
    grower = TreeGrower(options)
    context = judged(len(hidden), 40, seed=8)
    chains = grower.grow(toy_draft, hidden, context).trees
    pool = CandidatePool(context, options.dynamic_tree().num_candidates)
    ask_draft(pool, toy_draft, hidden, options.dynamic_tree())
    whole = pool.best(63)
    for request in range(len(hidden)):
        known = dict(
            zip(paths_of(whole, request), whole.joint[request].tolist(), strict=False)
        )
        path: Path = ()
        while len(path) < 6 and (
            below := [p for p in known if p[:-1] == path and len(p) == len(path) + 1]
        ):
            path = max(below, key=lambda p: known[p])
        assert paths_of(chains, request) == [path[:n] for n in range(1, len(path) + 1)]


def test_a_chain_of_an_empty_tree_is_empty() -> None:
    empty = GrownTrees.empty(3, torch.device("cpu"))
    assert likeliest_chains(empty, 5).sizes.tolist() == [0, 0, 0]


def test_credit_is_the_texts_share(toy_draft, hidden) -> None:
    """Of a mixture w + (1 - W) q a token owes w to the text."""
    context = judged(len(hidden), 20, seed=1)
    pool = CandidatePool(context, 8)
    ask_draft(pool, toy_draft, hidden, DynamicTree(25, top_k=8, depth=1))
    credit = pool.walk().credit
    first = context.nodes.depths == 1
    assert torch.equal(credit.isnan(), ~first)
    _, children = toy_draft.first_top_k(hidden, 8)
    for request, node in first.nonzero().tolist():
        token = context.nodes.tokens[request, node]
        head = float(
            (children.values.exp() * (children.tokens == token))[request].sum()
        )
        held = float(context.beside[request][first[request]].sum())
        own = float(context.beside[request, node])
        wanted = own / (own + (1 - held) * head or 1.0)
        assert float(credit[request, node]) == pytest.approx(wanted, rel=1e-4)
