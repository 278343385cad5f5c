# SPDX-License-Identifier: Apache-2.0
"""What context nodes are worth, and how that is learned."""

import pytest
import torch

from vllm_clover2 import ops
from vllm_clover2.ops.calibration import path_product
from vllm_clover2.tree import Calibration, ContextLimits
from vllm_clover2.tree.context import ContextWalk


def nodes_of(*texts: list[int], **limits: int):
    width = max(map(len, texts))
    history = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    lengths = torch.tensor([len(text) for text in texts], dtype=torch.int32)
    requests = torch.arange(len(texts), dtype=torch.int32)
    return ops.context_nodes(history.int(), requests, lengths, *ContextLimits(**limits))


def walk_of(nodes, cells, credit=torch.nan) -> ContextWalk:
    full = torch.full(cells.shape, credit)
    return ContextWalk(nodes.tokens, nodes.parents, nodes.depths, cells, full)


def test_longer_matches_and_agreement_are_worth_more() -> None:
    calibration = Calibration()
    passage = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]
    short, long = [9, 20, 5, 7, 8, 20], [*passage, 5, 1, 2, *passage]
    agreeing = [20, 5, 1, 20, 5, 2, 20, 5, 3, 20]
    worth = [
        float(calibration.judge(nodes_of(text)).alone[0, 0])
        for text in (short, agreeing, long)
    ]
    assert worth == sorted(worth)
    assert worth[0] < 0.5 < worth[2]


def test_siblings_never_hold_everything() -> None:
    calibration = Calibration()
    text = [1, 2, 3, 4, 5, 6, 7, 8] * 6
    nodes = nodes_of(text[:-3], text, [3] * 40, [5, 6])
    context = calibration.judge(nodes)
    for weights in (context.alone, context.beside):
        sums = torch.zeros(len(weights), weights.shape[1] + 1)
        sums.scatter_add_(1, nodes.parents.long(), weights)
        assert sums.max() <= 0.98 + 1e-6
        assert (weights[~nodes.valid] == 0).all()
    assert int(nodes.sizes[3]) == 0


def test_joint_is_the_product_along_the_path() -> None:
    context = Calibration().judge(nodes_of([1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]))
    joint = [1.0]
    for node in range(int(context.nodes.sizes[0])):
        above = joint[int(context.nodes.parents[0, node])]
        joint.append(above * float(context.alone[0, node]))
    assert context.joint[0, : len(joint) - 1].tolist() == pytest.approx(joint[1:])
    deep = torch.full((1, 40), 0.5)
    chain = torch.arange(40)[None]
    assert path_product(deep, chain)[0].tolist() == pytest.approx(
        [0.5**n for n in range(1, 41)]
    )


@pytest.mark.parametrize("rate", [0.1, 0.8])
def test_what_happens_is_learned(rate: float) -> None:
    """A kind of node that comes true so often gets that probability, its own alone."""
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration()
    nodes = nodes_of([7, 8, 9, 7], max_depth=1)
    assert nodes.tokens[0, 0] == 8
    cells = calibration.judge(nodes).cells
    before = calibration.judge(nodes_of([7, 8, 9, 1, 7, 8], max_depth=1))
    for _ in range(600):
        told = 8 if torch.rand((), generator=generator) < rate else 3
        calibration.observe(walk_of(nodes, cells), torch.tensor([[told, 5]]))
    context = calibration.judge(nodes)
    assert float(context.alone[0, 0]) == pytest.approx(rate, abs=0.1)
    after = calibration.judge(nodes_of([7, 8, 9, 1, 7, 8], max_depth=1))
    assert torch.equal(before.alone, after.alone)  # a match of two: another kind


def test_a_node_is_tried_only_if_its_parent_came_true() -> None:
    calibration = Calibration()
    nodes = nodes_of([7, 8, 9, 4, 7])
    paths = nodes.tokens[0, : int(nodes.sizes[0])].tolist()
    assert paths[:2] == [8, 9]
    cells = calibration.judge(nodes).cells
    before = calibration.judge(nodes).alone.clone()
    calibration.observe(walk_of(nodes, cells), torch.tensor([[1, 9]]))  # 8 did not
    after = calibration.judge(nodes).alone
    assert after[0, 0] < before[0, 0]
    assert torch.equal(after[0, 1:], before[0, 1:])


def test_what_is_not_known_yet_teaches_nothing() -> None:
    calibration = Calibration()
    nodes = nodes_of([7, 8, 9, 4, 7])
    before = calibration.judge(nodes)
    calibration.observe(
        walk_of(nodes, calibration.judge(nodes).cells), torch.full((1, 3), -1)
    )
    assert torch.equal(calibration.judge(nodes).alone, before.alone)


def test_weights_beside_a_head_follow_the_credit() -> None:
    """Of what came true the text explains a quarter: so much is its weight."""
    calibration = Calibration()
    nodes = nodes_of([7, 8, 9, 7], max_depth=1)
    walk = walk_of(nodes, calibration.judge(nodes).cells, credit=0.25)
    for _ in range(600):
        calibration.observe(walk, torch.tensor([[8]]))
    context = calibration.judge(nodes)
    assert float(context.beside[0, 0]) == pytest.approx(0.25, abs=0.03)
    assert float(context.alone[0, 0]) > 0.9


def test_the_past_fades() -> None:
    calibration = Calibration()
    nodes = nodes_of([7, 8, 9, 7], max_depth=1)
    walk = walk_of(nodes, calibration.judge(nodes).cells)
    for told in (8, 3):
        for _ in range(4000):
            calibration.observe(walk, torch.tensor([[told]]))
    assert float(calibration.judge(nodes).alone[0, 0]) < 0.2
