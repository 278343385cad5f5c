# SPDX-License-Identifier: Apache-2.0
"""What data-parallel ranks of a target with experts need: they run in step.

A rank without requests runs dummy batches, and all ranks agree on every pass. vLLM's
CPU build cannot run such targets data-parallel, so the other ranks are made up here.
"""

from collections.abc import Callable

import pytest
import torch
from engine_fixtures import Baseline, random_prompts
from engines import Engine, Output, assert_same
from planting import CommitSpy, Planter, with_truth
from vllm.v1.worker import dp_utils


def test_dummy_batches_between_steps(
    engine: Engine,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
) -> None:
    """A rank runs them also while its requests wait for the scheduler."""
    requests = random_prompts(8, seed=140)
    expected = baseline(requests)
    plant(seed=140)
    ids = [engine.add(request) for request in with_truth(requests, expected)]
    outputs: dict[str, Output] = {}
    while engine.busy:
        outputs |= engine.step()
        engine.llm.collective_rpc("execute_dummy_batch")
    assert_same(expected, [outputs[i] for i in ids], requests)
    assert commits.moved > len(requests)


def test_ranks_agree_on_passes_of_the_target_only(
    engine: Engine,
    baseline: Baseline,
    plant: Callable[..., Planter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Drafting is a matter of each rank: others would never take part in its passes."""
    requests = random_prompts(4, seed=141)
    expected = baseline(requests)
    agreed: list[int] = []

    def synchronize(
        rows: int, padded_rows: int, *_: object
    ) -> tuple[bool, torch.Tensor, int]:
        agreed.append(rows)
        return False, torch.tensor([padded_rows, 1], dtype=torch.int32), 0

    monkeypatch.setattr(dp_utils, "_synchronize_dp_ranks", synchronize)
    parallel = engine.runner.parallel_config
    monkeypatch.setattr(parallel, "data_parallel_size", 2)
    monkeypatch.setattr(parallel, "is_moe_model", True)
    plant(seed=141)  # among others, lets the head be asked
    levels = engine.runner.stats.counts["levels grown"]
    ids = [engine.add(request) for request in with_truth(requests, expected)]
    outputs: dict[str, Output] = {}
    while engine.busy:
        before = len(agreed)
        outputs |= engine.step()
        assert len(agreed) <= before + 1
    assert_same(expected, [outputs[i] for i in ids], requests)
    assert engine.runner.stats.counts["levels grown"] > levels
    before = len(agreed)
    engine.llm.collective_rpc("execute_dummy_batch")
    assert len(agreed) == before + 1 > 2
