# SPDX-License-Identifier: Apache-2.0
"""Figures of a step go from the worker to what an API server exports."""

import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.spec_decode.metrics import SpecDecodingLogging, SpecDecodingStats

from vllm_clover2.integration import metrics, stats
from vllm_clover2.tree.options import TreeOptions

OPTIONS = TreeOptions()
DEPTH = OPTIONS.max_depth
NODES = OPTIONS.num_nodes
SCHEDULER: Any = SimpleNamespace(num_spec_tokens=NODES)
LABELS = {"model_name": "tiny", "engine": "3"}


@pytest.fixture
def prom() -> Iterator[metrics.Clover2Prom]:
    """Metrics of engine 3, which is served beside engine 2."""
    unregister_vllm_metrics()
    config = SimpleNamespace(
        method="clover2",
        num_speculative_tokens=NODES,
        tree_options=lambda: OPTIONS,
    )
    engines = {2: ["tiny", "2"], 3: ["tiny", "3"]}
    yield metrics.Clover2Prom(config, list(LABELS), engines)
    unregister_vllm_metrics()


def exported(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"vllm:{name}", LABELS | labels)


def sent(
    worker: stats.WorkerStats, verified: SpecDecodingStats | None
) -> SpecDecodingStats:
    """What an API server gets of a step, from another process."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    stats.attach(output, worker)
    output = pickle.loads(pickle.dumps(output))
    step = EngineCoreOutputs(scheduler_stats=SchedulerStats())
    step.scheduler_stats.spec_decoding_stats = verified
    stats.pass_on(SCHEDULER, output, [EngineCoreOutputs(), step])
    decoder = MsgpackDecoder(EngineCoreOutputs)
    return decoder.decode(
        MsgpackEncoder().encode(step)
    ).scheduler_stats.spec_decoding_stats


def verified_step() -> SpecDecodingStats:
    """Of two trees, of 25 nodes and of 7, one and two nodes were accepted."""
    verified = SpecDecodingStats.new(NODES)
    verified.observe_draft(25, 1)
    verified.observe_draft(7, 2)
    return verified


def test_figures_arrive_with_their_labels(prom: metrics.Clover2Prom) -> None:
    worker = stats.WorkerStats(DEPTH)
    for _ in range(2):  # what has been sent is not sent again
        worker.count(stats.VERIFIED, {"head": 20, "context": 8, "both": 4})
        worker.count(stats.REQUESTS, {"nothing found": 1})
        worker.counts["waited too long for draft KV: no head"] += 1
        worker.counts[stats.LEVELS] += 5
        worker.observe(stats.ACCEPTED_DEPTH, 1, 2)
        worker.observe(stats.DRAFTING_SECONDS, 0.003)
        prom.observe(sent(worker, verified_step()), 3)
    assert exported("clover2_verified_nodes_total", source="text") == 16
    assert exported("clover2_accepted_nodes_total", source="head") == 0
    assert exported("clover2_request_steps_total", outcome="nothing_found") == 2
    reason = "waited_too_long_for_draft_kv"
    assert exported("clover2_fallbacks_total", reason=reason) == 2
    assert exported("clover2_levels_grown_total") == 10
    assert exported("clover2_accepted_depth_bucket", le="1.0") == 2
    assert exported("clover2_accepted_depth_sum") == 6
    assert exported("clover2_drafting_seconds_sum") == pytest.approx(0.006)
    assert exported("clover2_verified_nodes_total", source="text", engine="2") == 0


def test_positions_of_vllms_counters_are_levels(prom: metrics.Clover2Prom) -> None:
    worker = stats.WorkerStats(DEPTH)
    prom.observe(sent(worker, verified_step()), 3)
    accepted = "spec_decode_num_accepted_tokens_per_pos_total"
    positions = [exported(accepted, position=str(n)) for n in range(DEPTH)]
    assert positions == [2, 1] + [0] * (DEPTH - 2)
    assert exported(accepted, position=str(DEPTH)) is None
    assert exported("spec_decode_num_drafts_total") == 2
    assert exported("spec_decode_num_draft_tokens_total") == 32


def test_a_step_that_verified_nothing_is_exported_but_not_logged(
    prom: metrics.Clover2Prom,
) -> None:
    worker = stats.WorkerStats(DEPTH)
    worker.count(stats.REQUESTS, {"load": 4})
    nothing = sent(worker, None)
    prom.observe(nothing, 3)
    assert exported("clover2_request_steps_total", outcome="load") == 4
    assert exported("spec_decode_num_drafts_total") == 0

    log = SpecDecodingLogging()
    metrics.observe_for_log(SpecDecodingLogging.observe, log, nothing)
    assert not log.num_drafts
    verified = sent(worker, verified_step())
    metrics.observe_for_log(SpecDecodingLogging.observe, log, verified)
    assert log.accepted_tokens_per_pos_lists == [[2, 1] + [0] * (DEPTH - 2)]


def test_engines_of_other_methods_are_left_alone() -> None:
    unregister_vllm_metrics()
    eagle = SimpleNamespace(method="eagle", num_speculative_tokens=3)
    prom = metrics.Clover2Prom(eagle, list(LABELS), {3: list(LABELS.values())})
    verified = SpecDecodingStats.new(3)
    verified.observe_draft(3, 1)
    prom.observe(verified, 3)
    accepted = "spec_decode_num_accepted_tokens_per_pos_total"
    assert [exported(accepted, position=str(n)) for n in range(3)] == [1, 0, 0]
    assert not [m for m in REGISTRY.collect() if "clover2" in m.name]
    log = SpecDecodingLogging()
    metrics.observe_for_log(SpecDecodingLogging.observe, log, verified)
    assert log.accepted_tokens_per_pos_lists == [[1, 0, 0]]
    unregister_vllm_metrics()


@pytest.mark.parametrize(
    ("output", "scheduler_stats"),
    [
        (EMPTY_MODEL_RUNNER_OUTPUT, SchedulerStats()),
        (ModelRunnerOutput(["a"], {"a": 0}), None),
    ],
    ids=["no-requests", "stats-off"],
)
def test_nothing_is_sent(output: Any, scheduler_stats: SchedulerStats | None) -> None:
    stats.attach(output, stats.WorkerStats(DEPTH))
    step = EngineCoreOutputs(scheduler_stats=scheduler_stats)
    stats.pass_on(SCHEDULER, output, [step])
    assert step.scheduler_stats in (None, SchedulerStats())
    assert not vars(EMPTY_MODEL_RUNNER_OUTPUT).keys() - vars(ModelRunnerOutput([], {}))


def test_a_scheduler_without_speculation_is_asked_for_nothing() -> None:
    """Of other methods, or of none: vLLM's own tests make such out of few parts."""
    output = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    step = EngineCoreOutputs(scheduler_stats=SchedulerStats())
    stats.pass_on(object(), output, [step])  # type: ignore[arg-type]
    assert step.scheduler_stats == SchedulerStats()
