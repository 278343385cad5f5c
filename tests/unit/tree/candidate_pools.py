# SPDX-License-Identifier: Apache-2.0
"""Context candidates for tests."""

import random

import torch

from vllm_clover2.tree import Calibration, ContextNodes
from vllm_clover2.tree.context import ContextCandidates

Path = tuple[int, ...]


def random_tries(requests: int, nodes: int, seed: int) -> ContextNodes:
    """Tries over a few tokens, of which a toy draft knows the odd ones."""
    rng = random.Random(seed)
    columns: list[list[list[int]]] = [[], [], [], [], []]
    sizes = []
    for _ in range(requests):
        paths: list[Path] = [()]
        places = [12]
        rows = []
        for _ in range(rng.randint(0, nodes)):
            parent = rng.randrange(len(paths))
            path = (*paths[parent], rng.randrange(1, 20))
            if path in paths or not places[parent]:
                continue
            paths.append(path)
            through = rng.randint(1, places[parent])
            places.append(through)
            rows.append((path[-1], parent, len(path), rng.randint(1, 16), through))
        sizes.append(len(rows))
        rows += [(-1, 0, 0, 0, 0)] * (nodes - len(rows))
        for column, values in zip(columns, zip(*rows, strict=True), strict=True):
            column.append(list(values))
    tokens, *rest = (torch.tensor(column) for column in columns)
    return ContextNodes(
        tokens, *(x.int() for x in rest), torch.tensor(sizes, dtype=torch.int32)
    )


def judged(requests: int, nodes: int, seed: int) -> ContextCandidates:
    """Random tries with the worth of their kinds, changed a little: no ties."""
    context = Calibration().judge(random_tries(requests, nodes, seed))
    generator = torch.Generator().manual_seed(seed)
    shrink = 1.0 - 0.3 * torch.rand(context.alone.shape, generator=generator)
    return context._replace(
        alone=context.alone * shrink, beside=context.beside * shrink
    )
