# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of drafting, captured and replayed as vLLM's own speculators do it."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)


class DraftingGraphs(CudaGraphManager):
    """One part of drafting as a CUDA graph for every batch size that vLLM captures.

    A batch is padded to the next of them. The part reads buffers that stay where they
    are; what it returned is overwritten by the next replay.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        target_mode: CUDAGraphMode,
        rows: int,  # of each request, in this part
    ) -> None:
        # Trees keep the target's graphs piecewise; there is no attention to them here.
        mode = CUDAGraphMode.FULL_DECODE_ONLY if target_mode else CUDAGraphMode.NONE
        # With it, there would be sizes for all widths that the scheduler may choose.
        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        super().__init__(plain, device, mode, decode_query_len=rows)
        self.vllm_config = vllm_config
        self._results: dict[BatchExecutionDescriptor, Any] = {}

    def capture_part(
        self,
        # Prepares the buffers for a batch of that size; returns what is captured.
        part_for: Callable[[BatchExecutionDescriptor], Callable[[], Any]],
        name: str,
    ) -> None:
        """Capture ``part_for`` every size, the largest first."""

        def create_forward_fn(
            desc: BatchExecutionDescriptor, warmup: bool
        ) -> Callable[[CUDAGraphMode], None]:
            del warmup  # both times all buffers are prepared anew
            part = part_for(desc)

            def forward(_: CUDAGraphMode) -> None:
                self._results[desc] = part()

            return forward

        self.capture(create_forward_fn, f"Capturing CUDA graphs ({name})")

    def size_for(self, num_reqs: int) -> BatchExecutionDescriptor | None:
        """The size that so many requests are padded to; None: there is no graph."""
        rows = self.decode_query_len
        desc = self.dispatch(num_reqs, num_reqs * rows, rows, num_active_loras=0)
        return desc if desc.cg_mode == CUDAGraphMode.FULL else None

    def replay(self, size: BatchExecutionDescriptor) -> Any:
        """Run the part on what is in the buffers now; returns what it returns."""
        self.run_fullgraph(size)
        return self._results[size]
