# SPDX-License-Identifier: Apache-2.0
"""What the workers of Model Runner V1 have in common."""

from typing import Any


class Clover2WorkerMixin:
    """What our CPU and CUDA workers add to vLLM's."""

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.model_runner.measure_cost()
        return times

    def clover2_stats(self) -> dict[str, int]:
        """What was counted since the start, as ``/metrics`` shows it by labels.

        Nodes verified and accepted by source, requests by what was drafted for them,
        levels grown, and why some requests got less than a tree. For
        ``LLM.collective_rpc("clover2_stats")``.
        """
        return self.model_runner.counts()

    def clover2_step_milliseconds(self) -> dict[int, float]:
        """Time of a step by its rows, measured at start and learned since.

        Empty where trees are not adaptive. For
        ``LLM.collective_rpc("clover2_step_milliseconds")``.
        """
        return self.model_runner.step_milliseconds()

    def clover2_part_milliseconds(self) -> dict[str, float]:
        """Times of the parts of one request's step, measured by this call.

        ``target_1`` and ``target_N`` are the target over one row and over a tree's,
        ``augment_N`` the augmenting block over N committed rows, ``grow`` a tree, both
        only with a head. For ``LLM.collective_rpc("clover2_part_milliseconds")``,
        between requests.
        """
        seconds = self.model_runner.measure_parts()
        return {part: 1e3 * time for part, time in seconds.items()}
