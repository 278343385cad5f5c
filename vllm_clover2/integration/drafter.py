# SPDX-License-Identifier: Apache-2.0
"""What a step's drafting needs of its drafter, with a head and without one."""

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger

from vllm_clover2.tree.options import TreeOptions
from vllm_clover2.tree.step_cost import StepCost
from vllm_clover2.tree.types import MAX_ROWS

COMMITTED_ROWS = 3
"""A step commits its root and the accepted nodes: two or three rows."""
MEASURED_REQUESTS = 8
"""Of which one more costs what the last one did."""
_MEASURED_ROWS = tuple(2**n for n in range(11))
_LONG_PASS = 0.1
"""Seconds. Starting must not take long; further rows cost what the last ones did."""

logger = init_logger(f"vllm.{__name__}")


class Drafter:
    """Measures what steps cost, and keeps ranks alike; a head adds its own parts."""

    options: TreeOptions
    device: torch.device
    max_num_tokens: int  # rows of the largest step

    def cost_parts(self) -> list[Callable[[], Any]]:
        """Runs whose times :meth:`drafting_costs` wants; none without a head."""
        return []

    def drafting_costs(self, seconds: list[float]) -> tuple[float, float, float, float]:
        """Seconds of an augmenting pass and of a row in it, of a level and of a node.

        ``seconds`` are the times of :meth:`cost_parts`.
        """
        return 0.0, 0.0, 0.0, 0.0

    def named_parts(self) -> dict[str, Callable[[], Any]]:
        """Parts of one request's step beside the target's, see ``measure_parts``."""
        return {}

    def measure_cost(self, pass_rows: Callable[[int], Any]) -> StepCost | None:
        """Measure what steps cost, for adaptive trees; None where they are not.

        ``pass_rows`` runs the target over so many rows, output head included.
        """
        if self.options.has_fixed_shape or not self.options.adaptive:
            return None
        rows = self._rows_to_measure(pass_rows)
        if len(rows) < 2:
            return None
        parts = [functools.partial(pass_rows, n) for n in rows]
        seconds = median_seconds([*parts, *self.cost_parts()], rounds=5)
        passes, drafting = seconds[: len(rows)], seconds[len(rows) :]
        measured = torch.tensor(
            [*passes, *self.drafting_costs(drafting)],
            dtype=torch.float64,
            device=self.device,
        )
        *passes, once, per_row, per_level, per_node = (
            get_world_group().broadcast(measured).tolist()
        )
        logger.info(
            "clover2: a pass takes %s",
            ", ".join(
                f"{1e3 * passed:.1f} ms over {n} row{'s'[: n > 1]}"
                for n, passed in zip(rows, passes, strict=True)
            ),
        )
        return StepCost(
            rows,
            passes,
            (once, per_row),
            (per_level, per_node),
            self.max_num_tokens,
        )

    def _rows_to_measure(self, pass_rows: Callable[[int], Any]) -> list[int]:
        """Row counts up to those whose pass takes long; all ranks choose rank 0's."""
        rows = []
        for n in _MEASURED_ROWS:
            if n > self.max_num_tokens:
                break
            rows.append(n)
            (seconds,) = median_seconds([functools.partial(pass_rows, n)], rounds=1)
            taken = torch.tensor([seconds], dtype=torch.float64, device=self.device)
            if n >= MAX_ROWS and get_world_group().broadcast(taken).item() > _LONG_PASS:
                break
        return rows

    def measure_parts(self, pass_rows: Callable[[int], Any]) -> dict[str, float]:
        """Seconds of the parts of one request's step, the names ending in their rows.

        Attention has no KV to read here, in the target and in a head.
        """
        rows = min(self.options.num_nodes + 1, self.max_num_tokens)
        parts: dict[str, Callable[[], Any]] = {
            "target_1": functools.partial(pass_rows, 1),
            f"target_{rows}": functools.partial(pass_rows, rows),
        } | self.named_parts()
        seconds = median_seconds(list(parts.values()), rounds=9)
        return dict(zip(parts, seconds, strict=True))


class ContextDrafter(Drafter):
    """Drafts without a head, ``"model": "none"``: the text is the only source.

    vLLM's runner makes it by its hook for drafters that are classes (see
    ``compat.patches.let_runner_make``).
    """

    kv_cache_gid = 0  # there is no KV of a draft to find by it
    _draft_attn_layer_names: frozenset[str] = frozenset()

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.options = vllm_config.speculative_config.tree_options()
        self.device = vllm_config.device_config.device
        self.max_num_tokens = vllm_config.scheduler_config.max_num_batched_tokens

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Nothing to load; vLLM's CPU runner calls it."""

    def propose(self, *args: Any, **kwargs: Any) -> Any:
        """Required by vLLM's hook; our runner never calls it."""
        raise NotImplementedError("clover2 drafts by Drafting.draft")


def median_seconds(parts: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median times of some parts, which wait for the device.

    They take turns, because a moment in which the machine is busy must not meet one of
    them alone: what counts is how they compare. A first round is not counted.
    """
    times = []
    for _ in range(rounds + 1):
        row = []
        for run in parts:
            start = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            row.append(time.perf_counter() - start)
        times.append(row)
    return [median(column) for column in zip(*times[1:], strict=True)]
