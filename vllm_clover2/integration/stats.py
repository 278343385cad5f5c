# SPDX-License-Identifier: Apache-2.0
"""What a worker counts, and the way of it to the API server's ``/metrics``.

A worker adds what a step counted to the step's ``ModelRunnerOutput``; in the engine
core it joins ``SchedulerStats``, which vLLM sends to exactly one of its API servers,
with the engine's number. So vLLM does what its own counters need for engines in other
processes and on other machines, for data parallelism and for several API servers. It
has no field for figures of a plugin: ours take the place of ``SpecDecodingStats.
num_draft_tokens_per_pos``, which no release reads and which means nothing for trees,
whose nodes have no position. The list may hold only integers; it gets a number that
tells it from a list of vLLM's own, the depth of the trees, and the bytes of a JSON
text. Prometheus files of the worker's own would not reach other machines, a plugin for
vLLM's stat loggers is not asked by ``LLM`` and loses metrics named ``vllm:``, and
asking by RPC would count twice with several API servers.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.spec_decode.metrics import SpecDecodingStats

_FIGURES = "clover2_figures"
"""Attribute of a ``ModelRunnerOutput``."""
_OURS = 2**31 - 1
"""First number of a list of ours; in one of vLLM's it counts a step's requests."""

VERIFIED, ACCEPTED, REQUESTS = "verified", "accepted", "requests"
"""Counts that are split: "verified, head" and so on."""
LEVELS = "levels grown"

ACCEPTED_DEPTH = "accepted_depth"
SIBLING_RANK = "accepted_sibling_rank"
DRAFTING_SECONDS = "drafting_seconds"
VERIFICATION_SECONDS = "verification_seconds"
PREDICTED_RATIO = "step_predicted_ratio"


class Figures(NamedTuple):
    """What one step counted."""

    depth: int  # levels of the deepest tree
    counts: dict[str, int]  # what has been added since the last step
    values: dict[str, list[float]]  # single observations, by histogram


class WorkerStats:
    """The figures of a worker: ``counts`` since it started, and those of a step."""

    def __init__(self, depth: int) -> None:
        self.counts: Counter[str] = Counter()
        self._depth = depth
        self._sent: Counter[str] = Counter()
        self._values: defaultdict[str, list[float]] = defaultdict(list)

    def count(self, kind: str, parts: dict[str, int]) -> None:
        """Add to a count that is split."""
        for part, number in parts.items():
            self.counts[f"{kind}, {part}"] += number

    def observe(self, histogram: str, *values: float) -> None:
        """Add single observations, Python numbers."""
        self._values[histogram].extend(values)

    def take(self) -> Figures:
        """What was added since the last call."""
        added, values = self.counts - self._sent, dict(self._values)
        self._sent = self.counts.copy()
        self._values.clear()
        return Figures(self._depth, dict(added), values)


def attach(output: Any, stats: WorkerStats) -> None:
    """Let a step's ``ModelRunnerOutput`` carry what was counted (in a worker).

    Outputs without requests are left alone: vLLM shares one among all steps.
    """
    if getattr(output, "req_ids", None):
        setattr(output, _FIGURES, stats.take())


def pass_on(
    scheduler: Scheduler, model_runner_output: Any, outputs: Iterable[Any]
) -> None:
    """Move a step's figures to its ``SchedulerStats`` (in the engine core).

    ``outputs`` are the ``EngineCoreOutputs`` of the step; none of them has
    ``scheduler_stats`` where the user has switched them off.
    """
    figures = getattr(model_runner_output, _FIGURES, None)
    if figures is None:
        return
    for output in outputs:
        if (scheduler_stats := output.scheduler_stats) is not None:
            stats = scheduler_stats.spec_decoding_stats
            if stats is None:  # nothing was verified
                stats = SpecDecodingStats.new(scheduler.num_spec_tokens)
                scheduler_stats.spec_decoding_stats = stats
            text = json.dumps([figures.counts, figures.values])
            stats.num_draft_tokens_per_pos = [_OURS, figures.depth, *text.encode()]


def figures_of(stats: SpecDecodingStats) -> Figures | None:
    """The figures that arrived with a step's stats; None: the engine has none."""
    if stats.num_draft_tokens_per_pos[:1] != [_OURS]:
        return None
    _, depth, *text = stats.num_draft_tokens_per_pos
    return Figures(depth, *json.loads(bytes(text)))
