# SPDX-License-Identifier: Apache-2.0
"""What context nodes are worth, and how that is learned: kernels against references."""

import pytest
import torch
from candidate_pools import random_tries

from vllm_clover2 import ops
from vllm_clover2.ops import calibration as reference
from vllm_clover2.tree import Calibration
from vllm_clover2.tree.context import ContextWalk


def told(nodes, steps: int, generator: torch.Generator) -> torch.Tensor:
    """Texts that follow a path of each trie for some steps; -1: not known yet."""
    texts = torch.randint(1, 20, (len(nodes.tokens), steps), generator=generator)
    for request, text in enumerate(texts):
        row, size = 0, int(nodes.sizes[request])
        for step in range(steps):
            below = [i for i in range(size) if nodes.parents[request, i] == row]
            if not below or torch.rand((), generator=generator) < 0.2:
                break
            at = below[int(torch.randint(len(below), (), generator=generator))]
            text[step], row = nodes.tokens[request, at], at + 1
        known = int(torch.randint(1, steps + 1, (), generator=generator))
        text[known:] = -1
    return texts


@pytest.mark.parametrize("requests", [1, 6])
@pytest.mark.parametrize("nodes", [1, 64])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_do_what_the_references_do(
    requests: int, nodes: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ops.backend("cpu") == "native", "build the ops first (make test does)"
    generator = torch.Generator().manual_seed(seed)
    kernels, references = Calibration(), Calibration()
    names = ("judge_context", "learn_context")
    for turn in range(20):
        tries = random_tries(requests, nodes, 100 * seed + turn)
        emitted = told(tries, 5, generator)
        credit = torch.rand(tries.tokens.shape, generator=generator)
        credit[torch.rand(credit.shape, generator=generator) < 0.5] = torch.nan
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(ops, name, getattr(torch.ops.clover2, name).default)
            found = step(kernels, tries, credit, emitted)
        with monkeypatch.context() as patched:
            for name in names:
                patched.setattr(ops, name, getattr(reference, name))
            expected = step(references, tries, credit, emitted)
        assert torch.equal(found.cells, expected.cells)
        for name in ("alone", "beside", "joint"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(kernels._counts, references._counts)
        torch.testing.assert_close(kernels._values, references._values)
    assert not torch.equal(kernels._values, Calibration()._values)


def step(calibration: Calibration, nodes, credit, emitted):
    """Judge the nodes, then learn from what followed; returns what was judged."""
    context = calibration.judge(nodes)
    walk = ContextWalk(nodes.tokens, nodes.parents, nodes.depths, context.cells, credit)
    calibration.observe(walk, emitted)
    return context
