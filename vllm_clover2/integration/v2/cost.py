# SPDX-License-Identifier: Apache-2.0
"""What steps cost on Model Runner V2, measured once its CUDA graphs are captured."""

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_clover2.integration.drafter import COMMITTED_ROWS, MEASURED_REQUESTS, Drafter
from vllm_clover2.integration.v2.speculator import ContextSpeculator, HeadSpeculator


class DeviceDrafter(Drafter):
    """Times drafting as it runs in service.

    Growing is one graph here: its "level" is what trees of any number of requests
    take, its "node" what one request more adds.
    """

    def __init__(
        self,
        speculator: HeadSpeculator | ContextSpeculator,
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        self.options, self.device = speculator.drafting.options, device
        scheduler = vllm_config.scheduler_config
        self.max_num_tokens = scheduler.max_num_batched_tokens
        self._speculator = speculator
        self._many = min(MEASURED_REQUESTS, scheduler.max_num_seqs)

    def cost_parts(self) -> list[Callable[[], Any]]:
        return self._speculator.parts_to_time(1, self._many)

    def drafting_costs(self, seconds: list[float]) -> tuple[float, float, float, float]:
        grow, *augment = (
            self._fixed_and_per_request(one, many)
            for one, many in zip(seconds[::2], seconds[1::2], strict=True)
        )
        return *(augment[0] if augment else (0.0, 0.0)), *grow

    def named_parts(self) -> dict[str, Callable[[], Any]]:
        grow, _, *augment = self._speculator.parts_to_time(1, COMMITTED_ROWS)
        if not augment:
            return {}
        return {f"augment_{COMMITTED_ROWS}": augment[1], "grow": grow}

    def _fixed_and_per_request(self, one: float, many: float) -> tuple[float, float]:
        more = max(many - one, 0.0) / max(self._many - 1, 1)
        return max(one - more, 0.0), more
