# SPDX-License-Identifier: Apache-2.0
"""NaN among a draft's scores ends in a shorter tree of that request alone."""

from collections.abc import Callable

import pytest
import torch
from scoring_draft import ScoringDraft

from vllm_clover2.tree import (
    DynamicTree,
    GrownTrees,
    chain,
    grow_dynamic,
    grow_static,
    paper_tree,
)

SICK = 2  # the request whose scores hold NaN
LIMITS = {"num_nodes": 63, "top_k": 3, "depth": 3}  # all candidates become nodes

Grow = Callable[..., GrownTrees]

GROWTHS: dict[str, Grow] = {
    "dynamic": lambda draft, h: grow_dynamic(draft, h, DynamicTree(**LIMITS)),
    "pruned": lambda draft, h: grow_dynamic(
        draft, h, DynamicTree(**LIMITS, min_expanded=1e-9)
    ),
    "dynamic-chain": lambda draft, h: grow_dynamic(
        draft, h, DynamicTree(num_nodes=4, top_k=1, depth=4)
    ),
    "chain": lambda draft, h: grow_static(draft, h, chain(4)),
    "paper": lambda draft, h: grow_static(draft, h, paper_tree()),
}


class SickDraft(ScoringDraft):
    """A draft whose states carry the request's number, so that one can be sick.

    `at_root` and `below` get that request's scores [n, Vd] at the root, or below the
    nodes of target tokens [n], and return others.
    """

    def __init__(self, draft, at_root=None, below=None) -> None:
        self.draft, self.token_ids = draft, draft.token_ids
        self.at_root = at_root or (lambda scores: scores)
        self.below = below or (lambda scores, _tokens: scores)

    def first(self, hidden):
        state, scores = self.draft.first(hidden[:, :-1])
        sick = hidden[:, -1] == SICK
        scores[sick] = self.at_root(scores[sick])
        return torch.cat([state, hidden[:, -1:]], 1), scores

    def advance(self, state, tokens):
        numbers = state[:, -1:]
        # A node that is none must not be looked up: in serving it would be read from
        # the target's embedding.
        assert ((tokens >= 0) & (tokens < len(self.draft.embedding))).all()
        state, scores = self.draft.advance(state[:, :-1], tokens)
        sick = numbers[:, 0] == SICK
        scores[sick] = self.below(scores[sick], tokens[sick])
        return torch.cat([state, numbers], 1), scores


@pytest.fixture
def numbered(hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [5, 17], the request's number last."""
    return torch.cat([hidden, torch.arange(5.0)[:, None]], dim=1)


def check(sick: GrownTrees, well: GrownTrees) -> int:
    """Other requests are as without NaN; the nodes of this one are nodes. Its size."""
    for found, expected in zip(sick, well):
        others = torch.arange(len(found)) != SICK
        assert torch.equal(found[others], expected[others])
    size = int(sick.sizes[SICK])
    assert (sick.tokens[SICK, :size] >= 0).all()
    assert sick.joint[SICK, :size].isfinite().all()
    rows = torch.arange(1, size + 1)
    assert (sick.parents[SICK, :size] >= 0).all()
    assert (sick.parents[SICK, :size] < rows).all()
    return size


@pytest.mark.parametrize("name", GROWTHS)
def test_no_score_at_the_root(toy_draft, numbered, name: str) -> None:
    grow = GROWTHS[name]
    well = grow(SickDraft(toy_draft), numbered)
    sick = SickDraft(toy_draft, at_root=lambda scores: scores * torch.nan)
    assert check(grow(sick, numbered), well) == 0


@pytest.mark.parametrize("name", GROWTHS)
def test_a_hidden_state_of_nan(toy_draft, numbered, name: str) -> None:
    """As a target with NaN gives it: the state itself goes on as NaN."""
    grow = GROWTHS[name]
    well = grow(SickDraft(toy_draft), numbered)
    numbered[SICK, :-1] = torch.nan
    assert check(grow(SickDraft(toy_draft), numbered), well) == 0


@pytest.mark.parametrize(
    ("name", "size"),
    # A static tree ends before its first node without a score.
    [("dynamic", None), ("pruned", None), ("dynamic-chain", 1), ("chain", 1)]
    + [("paper", 4)],
)
def test_no_score_below_one_node(
    toy_draft, numbered, name: str, size: int | None
) -> None:
    grow = GROWTHS[name]
    well = grow(SickDraft(toy_draft), numbered)
    first = well.tokens[SICK, 0]

    def below(scores, tokens):
        return scores.masked_fill((tokens == first)[:, None], torch.nan)

    grown = grow(SickDraft(toy_draft, below=below), numbered)
    found = check(grown, well)
    if size is not None:
        assert found == size
        return
    childless = [0, *(grown.tokens[SICK, :found] == first)]
    assert not any(childless[parent] for parent in grown.parents[SICK, :found])
    assert LIMITS["top_k"] <= found < int(well.sizes[SICK])


@pytest.mark.parametrize("name", GROWTHS)
@pytest.mark.parametrize("rank", [0, 5], ids=["likeliest", "unlikely"])
def test_no_score_for_one_token(toy_draft, numbered, name: str, rank: int) -> None:
    grow = GROWTHS[name]
    well = grow(SickDraft(toy_draft), numbered)
    _, scores = toy_draft.first(numbered[SICK : SICK + 1, :-1])
    draft_id = int(scores[0].argsort(descending=True)[rank])

    def at_root(scores):
        scores[:, draft_id] = torch.nan
        return scores

    grown = grow(SickDraft(toy_draft, at_root=at_root), numbered)
    size = check(grown, well)
    at_first = grown.parents[SICK, :size] == 0
    token = int(toy_draft.token_ids(torch.tensor(draft_id)))
    assert token not in grown.tokens[SICK, :size][at_first]
    assert size <= int(well.sizes[SICK])
