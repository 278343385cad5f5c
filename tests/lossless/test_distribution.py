# SPDX-License-Identifier: Apache-2.0
"""Unseeded samples have the target's distribution, by chi-square on 16 tokens.

Judged are the second and third token of an answer, both of which a tree step emits (the
first comes from the prompt). With 4,000 answers the test sees a shift of 4 % of the
probability mass in most runs; the negative control shifts a good part of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import Engine, EnginePool, Request
from planting import CommitSpy, Planter
from tiny_models import TinyModel, save_random_head, save_target
from transformers import LlamaForCausalLM

from vllm_clover2.bench.statistics import chi_square
from vllm_clover2.integration import sampling

SMALL = TinyModel(vocab_size=16, init=0.12, seed=3)
PROMPT = (3, 14, 7, 9)
NUM_SAMPLES = 4000


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("small-target"), SMALL)


@pytest.fixture(scope="module")
def small_engine(
    engines: EnginePool, small_target: Path, tmp_path_factory: pytest.TempPathFactory
) -> Engine:
    head = save_random_head(tmp_path_factory.mktemp("small-head"), SMALL)
    tree = {"num_speculative_tokens": 25}
    return engines.get(
        small_target, head, tree, skip_tokenizer_init=True, max_num_seqs=100
    )


@torch.inference_mode()
def expected_counts(
    target: Path, temperature: float, top_k: int
) -> np.ndarray:  # [16, 16]
    """Exact expectation of how often (second, third) token occurs."""
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32).eval()

    def next_token(texts: torch.Tensor) -> torch.Tensor:  # [n, length] -> [n, 16]
        logits = model(texts).logits[:, -1].double() / temperature
        kept = logits.topk(top_k).values[:, -1:]
        return logits.masked_fill(logits < kept, -torch.inf).softmax(-1)

    size = SMALL.vocab_size
    prompt = torch.tensor([PROMPT])
    one = torch.arange(size)[:, None]
    two = torch.cartesian_prod(one[:, 0], one[:, 0])
    first = next_token(prompt)[0]
    second = next_token(torch.cat([prompt.expand(size, -1), one], 1))
    third = next_token(torch.cat([prompt.expand(size**2, -1), two], 1))
    joint = first[:, None, None] * second[:, :, None] * third.view(size, size, size)
    return joint.sum(0).numpy() * NUM_SAMPLES


def p_value(engine: Engine, expected: np.ndarray, **params: float) -> float:
    torch.manual_seed(0)  # unseeded requests draw from the global generator
    request = Request(PROMPT, {"max_tokens": 3, "detokenize": False, **params})
    seen = np.zeros_like(expected)
    for output in engine.run([request] * NUM_SAMPLES):
        seen[output.tokens[1], output.tokens[2]] += 1
    assert (expected >= 5).sum() > 30
    return chi_square(seen, expected)


CASES = [
    pytest.param({"temperature": 1.0, "top_k": 16}, id="plain"),
    pytest.param({"temperature": 0.8, "top_k": 8}, id="top-k"),
]


@pytest.mark.parametrize("params", CASES)
def test_samples_have_the_targets_distribution(
    params: dict[str, float],
    small_engine: Engine,
    small_target: Path,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    plant(seed=80, vocab_size=SMALL.vocab_size, depth=2)
    p = p_value(small_engine, expected_counts(small_target, **params), **params)
    assert commits.accepted > NUM_SAMPLES / 3
    assert p > 1e-3


@pytest.mark.parametrize("params", CASES)
def test_a_walk_that_prefers_drafted_tokens_is_seen(
    params: dict[str, float],
    small_engine: Engine,
    small_target: Path,
    plant: Callable[..., Planter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: some picks are replaced by the first drafted child."""
    stock = sampling._Levels._sample
    calls = 0

    def biased(
        levels: Any,
        level: int,
        requests: list[int],
        index: torch.Tensor,
        nodes: torch.Tensor,
    ) -> Any:
        nonlocal calls
        calls += 1
        picks, told = stock(levels, level, requests, index, nodes)
        if calls % 4 == 0:
            trees = levels.batch.trees
            for request in requests:
                rows = slice(*trees.row_offsets[request : request + 2].tolist())
                children = (trees.parents[rows] == nodes[request]).nonzero()
                if len(children):
                    picks[request] = trees.tokens[rows][children[0, 0]]
        return picks, told

    monkeypatch.setattr(sampling._Levels, "_sample", biased)
    plant(seed=80, vocab_size=SMALL.vocab_size, depth=2)
    p = p_value(small_engine, expected_counts(small_target, **params), **params)
    assert p < 1e-6
