# SPDX-License-Identifier: Apache-2.0
"""The pool's ops: kernels against references, and what they refuse."""

import pytest
import torch
from candidate_pools import judged
from scoring_draft import ToyDraft

from vllm_clover2 import ops
from vllm_clover2.ops import candidates as reference
from vllm_clover2.tree import DynamicTree
from vllm_clover2.tree.candidates import CandidatePool
from vllm_clover2.tree.context import ContextCandidates
from vllm_clover2.tree.growth import ask_draft

TREES = {
    "default": DynamicTree(25, min_expanded=1e-9),
    "narrow": DynamicTree(63, top_k=2, depth=9),
    "pruned": DynamicTree(40, top_k=4, min_expanded=0.02, min_ratio=0.2),
}


@pytest.mark.parametrize("requests", [1, 5])
@pytest.mark.parametrize("nodes", [0, 1, 64])
@pytest.mark.parametrize("vocabulary", [40, 2])
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize("seed", range(3))
def test_a_pool_grows_as_with_the_references(
    requests: int,
    nodes: int,
    vocabulary: int,
    tree: DynamicTree,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * torch.randn(requests, 16, generator=generator, dtype=torch.float64)
    context = ContextCandidates.none(requests, hidden.device)
    if nodes:
        context = judged(requests, nodes, seed)
    ask = torch.rand(requests, generator=generator) < 0.8

    def grown():
        pool = CandidatePool(context, tree.num_candidates)
        asked = ask_draft(pool, ToyDraft(vocabulary), hidden, tree, ask)
        return asked, pool.best(tree.num_nodes), pool.walk()

    asked, trees, walk = grown()
    for name in ("add_candidates", "best_candidates"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    expected_asked, expected_trees, expected_walk = grown()
    assert asked == expected_asked
    for name in ("tokens", "parents", "depths", "sizes", "sources"):
        found, expected = getattr(trees, name), getattr(expected_trees, name)
        assert torch.equal(found, expected), name
    # A log at the edge of two steps of the grid may be rounded to either.
    torch.testing.assert_close(
        trees.joint, expected_trees.joint, atol=64 * 2.0**-12, rtol=0
    )
    torch.testing.assert_close(
        walk.credit, expected_walk.credit, equal_nan=True, atol=1e-5, rtol=1e-4
    )


def pool_arguments() -> dict:
    long, real = torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5)
    none = torch.zeros(1, 0)
    return {
        "tokens": long.clone(),
        "parents": long.clone(),
        "joint": real,
        "below": none,
        "credit": none.clone(),
        "by_head": none.bool(),
        "depths": none.int(),
        "beside": none.clone(),
        "first": 1,
        "level": 1,
        "rows": long[:, :1].clone(),
        "open_": torch.ones(1, 1),
        "asked": torch.zeros(1, dtype=torch.int64),
        "child_values": torch.zeros(1, 2),
        "child_tokens": torch.zeros(1, 2, dtype=torch.int64),
        "width": 2,
    }


@pytest.mark.skipif(ops.backend() != "native", reason="checks of the CPU kernel")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": torch.tensor([[7]])}, "rows must be rows below 1, found 7"),
        ({"asked": torch.tensor([3])}, "asked must be rows below 1, found 3"),
        ({"asked": torch.tensor([0]).int()}, "asked must be int64"),
        ({"child_values": torch.zeros(1, 9)}, r"tokens must be \[1, at least 10\]"),
        ({"open_": torch.ones(1, 1).double()}, "open_ must be"),
        ({"first": 0}, "first must be beyond the 0 context nodes"),
        ({"width": 0}, "width at least 1"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict, message: str) -> None:
    arguments = pool_arguments()
    ops.add_candidates(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        ops.add_candidates(*(arguments | changes).values())


def test_parents_must_stand_in_lower_rows() -> None:
    with pytest.raises(RuntimeError, match="parents must be rows below 1, found 2"):
        torch.ops.clover2.best_candidates.default(
            torch.tensor([[0, 2, 0]]),
            torch.zeros(1, 3),
            torch.zeros(1, 0),
            torch.zeros(1, 0).int(),
            2,
        )
