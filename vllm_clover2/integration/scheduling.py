# SPDX-License-Identifier: Apache-2.0
"""How a worker on Model Runner V2 tells the scheduler how much to verify.

The scheduler plans all steps, for all ranks, by a table that vLLM has for this: nodes
of every request by batch size ("dynamic speculative decoding"). A worker's choice goes
to it with a step's ``ModelRunnerOutput``; only those of the one rank that answers the
engine core arrive, so ranks need not agree.
"""

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

_WIDTH = "clover2_width"
"""Attribute of a ``ModelRunnerOutput``."""


def attach(model_runner_output: Any, width: int) -> None:
    """Let a step's output say how wide the coming steps shall be (in a worker)."""
    setattr(model_runner_output, _WIDTH, width)


def follow(scheduler: Scheduler, model_runner_output: Any) -> None:
    """Plan the coming steps as a worker wants them (in the engine core)."""
    width = getattr(model_runner_output, _WIDTH, None)
    if width is not None:
        table = scheduler.dynamic_sd_lookup
        scheduler.dynamic_sd_lookup = [width] * len(table)
