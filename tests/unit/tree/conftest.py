# SPDX-License-Identifier: Apache-2.0
"""One hand-drawn tree, random trees and a toy draft, for all tests of trees."""

from dataclasses import dataclass

import pytest
import torch
from scoring_draft import ToyDraft

from vllm_clover2.tree import MAX_ROWS


@dataclass(frozen=True)
class DrawnTree:
    """A tree with everything known about it written down by hand.

    0 (root)
    |- 1 "5"
    |  |- 3 "7"
    |  |  `- 6 "8"
    |  `- 4 "7"   same token as its sibling
    `- 2 "6"
       `- 5 "5"
    """

    tokens: tuple[int, ...] = (5, 6, 7, 7, 5, 8)
    parents: tuple[int, ...] = (0, 0, 1, 1, 2, 3)
    depths: tuple[int, ...] = (0, 1, 1, 2, 2, 2, 3)
    ancestor_rows: tuple[tuple[int, ...], ...] = (
        (0,),
        (0, 1),
        (0, 2),
        (0, 1, 3),
        (0, 1, 4),
        (0, 2, 5),
        (0, 1, 3, 6),
    )


@pytest.fixture
def drawn_tree() -> DrawnTree:
    return DrawnTree()


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    """Parent rows of a random tree: any earlier row."""
    return [
        int(torch.randint(0, row, (), generator=generator))
        for row in range(1, nodes + 1)
    ]


@pytest.fixture(params=range(8), ids=lambda seed: f"seed{seed}")
def random_trees(request: pytest.FixtureRequest) -> list[list[int]]:
    """Parents of a batch of trees; sizes from the root alone to the largest."""
    generator = torch.Generator().manual_seed(request.param)
    sizes = [0, 1, MAX_ROWS - 1]
    sizes += torch.randint(0, MAX_ROWS, (5,), generator=generator).tolist()
    return [random_parents(size, generator) for size in sizes]


@pytest.fixture
def toy_draft() -> ToyDraft:
    return ToyDraft(vocabulary=40)


@pytest.fixture
def hidden() -> torch.Tensor:
    """Hidden states [5, 16] of five requests."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(5, 16, generator=generator, dtype=torch.float64) * 2
