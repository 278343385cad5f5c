# SPDX-License-Identifier: Apache-2.0
"""The number of nodes a step verifies follows their value and their cost."""

import pytest
import torch

from vllm_clover2.tree.budget import (
    least_worth_verifying,
    sizes_worth_verifying,
    step_seconds,
)
from vllm_clover2.tree.types import GrownTrees


def grown(probabilities: list[list[float]]) -> GrownTrees:
    """Trees that differ only in their nodes' joint probabilities, padded with none."""
    width = max(map(len, probabilities))
    joint = torch.full((len(probabilities), width), -torch.inf)
    for row, values in zip(joint, probabilities, strict=True):
        row[: len(values)] = torch.tensor(values).log()
    sizes = torch.tensor([len(values) for values in probabilities], dtype=torch.int32)
    unused = torch.zeros(joint.shape, dtype=torch.int64)
    return GrownTrees(unused, unused.int(), unused.int(), joint, sizes)


def best_by_enumeration(trees: GrownTrees, seconds: torch.Tensor) -> float:
    """The best yield per second over every number of nodes, one by one."""
    requests = trees.joint.shape[0]
    nodes = sorted(trees.joint.exp().flatten().tolist(), reverse=True)
    return max(
        (requests + sum(nodes[:count])) / float(seconds[requests + count])
        for count in range(int(trees.sizes.sum()) + 1)
    )


def test_free_rows_keep_every_node() -> None:
    trees = grown([[0.5, 0.01], [0.9]])
    assert sizes_worth_verifying(trees, torch.ones(9)).tolist() == [2, 1]


def test_rows_as_dear_as_a_step_keep_none() -> None:
    trees = grown([[0.5, 0.3], [0.6]])
    seconds = torch.arange(9, dtype=torch.float32)  # no fixed cost at all
    assert sizes_worth_verifying(trees, seconds).tolist() == [0, 0]


def test_likelier_trees_get_more_nodes() -> None:
    trees = grown([[0.9, 0.8, 0.7], [0.2, 0.1, 0.05]])
    seconds = step_seconds([1, 2], [1.0, 1.2], 16)
    assert sizes_worth_verifying(trees, seconds).tolist() == [3, 0]


def test_table_shorter_than_the_batch_bounds_the_nodes() -> None:
    trees = grown([[0.9, 0.8, 0.7]])
    assert sizes_worth_verifying(trees, torch.ones(4)).tolist() == [2]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_number_of_nodes_is_better(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, 7, generator=generator).sort(1, descending=True).values
    trees = grown(values.tolist())
    seconds = step_seconds([1, 8, 40], [1.0, 1.1 + 0.05 * seed, 3.0 + seed], 64)
    sizes = sizes_worth_verifying(trees, seconds)
    kept = sum(values[row, :size].sum() for row, size in enumerate(sizes.tolist()))
    found = float((5 + kept) / seconds[5 + int(sizes.sum())])
    assert found == pytest.approx(best_by_enumeration(trees, seconds), rel=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_no_node_below_the_least_probability_is_kept(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(5, 7, generator=generator).sort(1, descending=True).values
    values *= 0.2 + 0.04 * seed
    trees = grown(values.tolist())
    seconds = step_seconds([1, 8, 40], [1.0, 1.1 + 0.05 * seed, 3.0 + seed], 64)
    sizes = sizes_worth_verifying(trees, seconds)
    least = least_worth_verifying(seconds, 5)[5]
    kept = [values[row, size - 1] for row, size in enumerate(sizes.tolist()) if size]
    assert all(value >= least for value in kept)


def test_least_probability_rises_with_the_requests() -> None:
    seconds = step_seconds([1, 2], [1.0, 1.5], 64)  # 0.5 and 0.5 a row
    least = least_worth_verifying(seconds, 8)
    assert least == pytest.approx([r / (0.5 + 0.5 * r) * 0.5 for r in range(9)])
    # A quarter of the yield of a step over four roots in a quarter of its time.
    assert least[4] == pytest.approx(4 / 2.5 * 0.5)


def test_cheaper_rows_later_keep_likely_nodes_worth_it() -> None:
    """Rows 2 to 4 are dear, the next 36 nearly free: together they may pay."""
    seconds = step_seconds([1, 4, 40], [1.0, 4.0, 4.1], 40)
    assert least_worth_verifying(seconds, 1)[1] < 0.01


def test_no_room_for_a_row_means_that_none_pays() -> None:
    seconds = step_seconds([1, 2], [1.0, 1.0], 4)
    assert least_worth_verifying(seconds, 9)[:4] == [0.0] * 4
    assert least_worth_verifying(seconds, 9)[4] > 1.0
    assert len(least_worth_verifying(seconds, 9)) == 5


def test_cost_curve_passes_the_measured_points_and_never_falls() -> None:
    seconds = step_seconds([1, 9, 33], [2.0, 4.0, 3.5], 40)
    assert seconds[[1, 9]].tolist() == [2.0, 4.0]
    assert seconds[5] == 3.0
    assert bool((seconds.diff() >= 0).all())
    assert len(seconds) == 41


@pytest.mark.parametrize(
    ("rows", "seconds"), [([1], [1.0]), ([2, 1], [1.0, 1.0]), ([1, 2], [1.0])]
)
def test_unusable_measurements_are_refused(
    rows: list[int], seconds: list[float]
) -> None:
    with pytest.raises(ValueError, match="ascending row counts"):
        step_seconds(rows, seconds, 8)
