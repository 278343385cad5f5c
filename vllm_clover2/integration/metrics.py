# SPDX-License-Identifier: Apache-2.0
"""Clover-2's metrics on ``/metrics``, beside vLLM's own counters of speculation.

Runs in API servers (and in the process of an ``LLM``); ``stats`` tells how figures get
there. Names and labels are vLLM's: ``vllm:clover2_...`` with ``model_name`` and
``engine``.
"""

import copy
import dataclasses
from typing import Any

import prometheus_client
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import (
    SpecDecodingLogging,
    SpecDecodingProm,
    SpecDecodingStats,
)

from vllm_clover2.integration import stats as figures
from vllm_clover2.integration.stats import figures_of
from vllm_clover2.tree.types import MAX_NODES

# Name after "vllm:clover2_", label, labels that exist from the start (others appear
# when they are first counted), help. Keys are those of split counts; the last one
# takes every other count, all of which are reasons.
_COUNTERS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    figures.VERIFIED: (
        "verified_nodes",
        "source",
        ("head", "text", "both"),
        "Nodes of token trees that the target verified, by who proposed them.",
    ),
    figures.ACCEPTED: (
        "accepted_nodes",
        "source",
        ("head", "text", "both"),
        "Verified nodes that were accepted, by who proposed them.",
    ),
    figures.REQUESTS: (
        "request_steps",
        "outcome",
        ("drafted", "load", "nothing_found", "excluded"),
        "Requests that a step gave tokens, by what was drafted for their next one.",
    ),
    "": (
        "fallbacks",
        "reason",
        (),
        "Requests that got less than a tree in a step, by reason.",
    ),
}
_LABELS = {"context": "text"}
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    figures.ACCEPTED_DEPTH: (
        (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, MAX_NODES),
        "Accepted nodes of a verified draft.",
    ),
    figures.SIBLING_RANK: (
        (1, 2, 3, 4, 5, 6, 8, 12, 16, MAX_NODES),
        "Place of an accepted node among its siblings, 1 being the likeliest.",
    ),
    figures.DRAFTING_SECONDS: (
        (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
        "Seconds that a step's drafting took, for the whole batch.",
    ),
    figures.VERIFICATION_SECONDS: (
        (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
        "Seconds of the target's part of a step that verified drafts.",
    ),
    figures.PREDICTED_RATIO: (
        (0.25, 0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0),
        "Seconds that the cost model predicted for a step by those that it took.",
    ),
}


class Clover2Prom(SpecDecodingProm):
    """vLLM's speculative counters, and for a ``clover2`` engine its metrics."""

    _histogram_cls = prometheus_client.Histogram

    def __init__(
        self,
        speculative_config: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
        is_diffusion: bool = False,
    ) -> None:
        ours = getattr(speculative_config, "method", None) == "clover2"
        if ours:
            # vLLM counts accepted tokens by position, of which a tree has as many as
            # levels; the stock class makes one for every node.
            speculative_config = copy.copy(speculative_config)
            depth = speculative_config.tree_options().max_depth
            speculative_config.num_speculative_tokens = depth
        super().__init__(
            speculative_config, labelnames, per_engine_labelvalues, is_diffusion
        )
        self._labelvalues = per_engine_labelvalues
        if ours:
            self._register(labelnames)

    def _register(self, labelnames: list[str]) -> None:
        self._split: dict[str, Any] = {}
        for key, (name, label, known, text) in _COUNTERS.items():
            counter = self._counter_cls(
                name=f"vllm:clover2_{name}",
                documentation=text,
                labelnames=[*labelnames, label],
            )
            self._split[key] = counter
            for values in self._labelvalues.values():
                for value in known:
                    counter.labels(*values, value)
        self._levels = create_metric_per_engine(
            self._counter_cls(
                name="vllm:clover2_levels_grown",
                documentation="Levels that the head was asked for, by whole batches.",
                labelnames=labelnames,
            ),
            self._labelvalues,
        )
        self._histograms = {
            name: create_metric_per_engine(
                self._histogram_cls(
                    name=f"vllm:clover2_{name}",
                    documentation=text,
                    labelnames=labelnames,
                    buckets=buckets,
                ),
                self._labelvalues,
            )
            for name, (buckets, text) in _HISTOGRAMS.items()
        }

    def observe(
        self, spec_decoding_stats: SpecDecodingStats, engine_idx: int = 0
    ) -> None:
        super().observe(spec_decoding_stats, engine_idx)
        found = figures_of(spec_decoding_stats)
        if found is None:
            return
        for name, count in found.counts.items():
            if name == figures.LEVELS:
                self._levels[engine_idx].inc(count)
                continue
            counter, label = self._place(name)
            counter.labels(*self._labelvalues[engine_idx], label).inc(count)
        for name, values in found.values.items():
            histogram = self._histograms[name][engine_idx]
            for value in values:
                histogram.observe(value)

    def _place(self, count: str) -> tuple[Any, str]:
        """The counter of a count, and its label's value."""
        kind, _, part = count.partition(", ")
        if kind in self._split:
            return self._split[kind], _LABELS.get(part, part).replace(" ", "_")
        return self._split[""], reason_label(count)


def reason_label(reason: str) -> str:
    """A reason as the value of a label.

    >>> reason_label("structured output: drafted as a chain")
    'structured_output'
    """
    return reason.partition(":")[0].lower().replace(" ", "_")


def observe_for_log(
    stock: Any, log: SpecDecodingLogging, stats: SpecDecodingStats
) -> None:
    """``SpecDecodingLogging.observe`` for steps of ours.

    A step that verified nothing has stats here, unlike vLLM's, and would be divided by.
    """
    found = figures_of(stats)
    if found is None:
        stock(log, stats)
    elif stats.num_drafts:
        by_depth = stats.num_accepted_tokens_per_pos[: found.depth]
        stock(log, dataclasses.replace(stats, num_accepted_tokens_per_pos=by_depth))
