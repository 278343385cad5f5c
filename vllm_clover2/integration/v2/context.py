# SPDX-License-Identifier: Apache-2.0
"""The requests' own texts as a source of candidates, all of it on the device.

Model Runner V2 keeps all texts in memory that the device reads, by slot.
"""

import torch
from vllm.v1.worker.gpu.states import RequestState

from vllm_clover2 import ops
from vllm_clover2.tree.context import (
    Calibration,
    ContextCandidates,
    ContextLimits,
    ContextWalk,
)


class DeviceContext:
    """Candidates of a step; learns from how the texts went on since the last one."""

    def __init__(
        self,
        limits: ContextLimits,
        calibration: Calibration,
        states: RequestState,
        device: torch.device,
    ) -> None:
        self._limits = limits
        self._calibration = calibration
        self._texts = states.all_token_ids
        self._lengths = states.total_len
        # The last row is that of slot -1, of requests that only pad a batch.
        shape = states.max_num_reqs + 1, limits.max_nodes

        def by_slot(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # What was offered last, and to a text of which length. Depth 0: nothing.
        self._walk = ContextWalk(
            by_slot(torch.int64),
            by_slot(torch.int32),
            by_slot(torch.int32),
            by_slot(torch.int64),
            by_slot(torch.float32),
        )
        self._seen = torch.zeros(shape[0], dtype=torch.int32, device=device)

    def candidates(
        self,
        slots: torch.Tensor,  # [B] int64
        num_sampled: torch.Tensor,  # [B] int32 tokens that the step emitted
    ) -> ContextCandidates:
        """What may follow in the texts of these slots, after learning from the step."""
        lengths = self._lengths.gpu[slots]
        self._learn(slots, lengths - num_sampled, num_sampled)
        nodes = ops.context_nodes(self._texts.gpu, slots.int(), lengths, *self._limits)
        return self._calibration.judge(nodes)

    def remember(self, slots: torch.Tensor, walk: ContextWalk) -> None:
        """Keep what was offered until the texts have gone on."""
        for kept, part in zip(self._walk, walk, strict=True):
            kept[slots] = part
        self._seen[slots] = self._lengths.gpu[slots]

    def _learn(
        self,
        slots: torch.Tensor,  # [B] int64
        before: torch.Tensor,  # [B] int32 length of each text before the step
        num_sampled: torch.Tensor,  # [B] int32
    ) -> None:
        texts = self._texts.gpu
        levels = torch.arange(self._limits.max_depth, device=slots.device)
        after = (before[:, None] + levels).clamp(max=texts.shape[1] - 1)
        # A slot may have a new request, to whom nothing was offered yet.
        offered = (self._seen[slots] == before)[:, None]
        emitted = texts[slots[:, None], after].long()
        emitted.masked_fill_(~(offered & (levels < num_sampled[:, None])), -1)
        walk = ContextWalk(*(part[slots] for part in self._walk))
        self._calibration.observe(walk, emitted)
