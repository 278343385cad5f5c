# SPDX-License-Identifier: Apache-2.0
"""Which path of each tree the target accepts, without asking the host.

vLLM's sampler on Model Runner V2 draws noise that follows from a request's seed and the
position alone. So all rows are sampled at once, each at the position that it would
have as text: a row that turns out to be on the accepted path has drawn what plain
decoding draws there.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import SpeculativeConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_clover2.integration.step import accept
from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.types import NO_TOKEN


class TreeRejectionSampler(RejectionSampler):
    """Accepts what the target itself picks; vLLM's own compares probabilities."""

    def __init__(
        self,
        sampler: Sampler,
        spec_config: SpeculativeConfig,
        device: torch.device,
        trees: DeviceTrees,
    ) -> None:
        super().__init__(sampler, spec_config, device)
        self._trees = trees
        self._path_rows = torch.empty(0)

    def _verify(
        self,
        logits: torch.Tensor,  # [rows, vocab]
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,  # [rows] int32 tokens of the rows
        pos: torch.Tensor,  # [rows] int64, root + row of the tree
        cu_num_logits: torch.Tensor,  # [R + 1] int32
        idx_mapping: torch.Tensor,  # [R] int64 slots
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,  # [rows] int64 slots
        expanded_local_pos: torch.Tensor,  # [rows] int32 row of the tree
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,  # [rows] int32, -1: must not be accepted
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Processed logits, emitted tokens [R, levels] and their numbers [R]."""
        rows = self._trees.rows(expanded_idx_mapping, expanded_local_pos)
        positions = pos - expanded_local_pos + rows.depths
        processed = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            positions,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        states = self.sampler.sampling_states
        picks = gumbel_sample(
            processed,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            positions,
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )
        accepted = accept(
            picks,
            verify_draft_sampled.long().masked_fill(~rows.drafted, NO_TOKEN),
            rows.parents,
            cu_num_logits,
            self._trees.max_depth,
        )
        self._trees.accepted(
            idx_mapping, accepted.paths, accepted.lengths, rows.drafted
        )
        self._path_rows = self._rows_on_path(expanded_idx_mapping, expanded_local_pos)
        return processed, accepted.tokens, accepted.lengths + 1

    def _rows_on_path(
        self,
        slots: torch.Tensor,  # [rows] int64
        numbers: torch.Tensor,  # [rows] int32
    ) -> torch.Tensor:
        """The row [rows] int64 after which the emitted token of each place was picked.

        vLLM keeps the n-th emitted token of a request at its n-th row.
        """
        level = numbers.long() - 1
        last = self._trees.max_depth - 1
        on_path = self._trees.paths[slots, level.clamp(0, last)].clamp(min=0)
        roots = torch.arange(len(slots), device=slots.device) - numbers
        return roots + on_path.masked_fill((level < 0) | (level > last), 0)

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,  # [rows, vocab]
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        if max_num_logprobs == NO_LOGPROBS:
            return None
        arguments: tuple[Any, ...] = (cu_num_logits, cu_num_logits_np, max_num_logprobs)
        on_path = logits[self._path_rows]
        return super()._get_logprobs_tensors(sampled, num_sampled, on_path, *arguments)
