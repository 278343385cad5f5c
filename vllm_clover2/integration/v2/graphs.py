# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of drafting, and what those of the target's pass read of trees.

Captured and replayed as vLLM's own speculators do it; the target's by vLLM itself.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    CudaGraphManager,
)
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_clover2.integration.attention import TreeRows


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
        # There are no prompts in these batches, whatever those of the target hold.
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


class TreesInGraphs:
    """Rows of trees where the CUDA graphs of the target's pass read them.

    There is a graph for a batch where all requests verify equally many rows. vLLM's own
    ``query_start_loc``, which stays in place too, tells which; requests that only pad
    the batch have none.
    """

    def __init__(self, max_requests: int, max_rows: int, device: torch.device) -> None:
        self._prefix_lens = torch.zeros(max_requests, dtype=torch.int32, device=device)
        # While a graph is captured every row sees a root.
        self._ancestors = torch.ones(max_rows, dtype=torch.int64, device=device)

    def rows_of(self, batch: InputBatch) -> TreeRows:
        """What the graph of a batch of that size reads, in every replay."""
        requests = batch.num_reqs
        return TreeRows(
            requests=None,
            prefix_lens=self._prefix_lens[:requests],
            query_starts=batch.query_start_loc[:requests],
            row_offsets=batch.query_start_loc[: requests + 1],
            ancestors=self._ancestors[: batch.num_tokens],
            covers_batch=True,
        )

    def fill(self, trees: TreeRows) -> None:
        """Put the trees of the next replay there.

        Raises:
            RuntimeError: vLLM chose a graph for a batch that has other rows too.

        """
        if not trees.covers_batch:
            raise RuntimeError(
                "clover2: a CUDA graph of the whole pass needs a batch of drafts, but "
                'some rows of this one are prompts; set cudagraph_mode "PIECEWISE" in '
                "compilation_config, and report this, please."
            )
        self._prefix_lens[: len(trees.prefix_lens)] = trees.prefix_lens
        self._ancestors[: len(trees.ancestors)] = trees.ancestors
