# SPDX-License-Identifier: Apache-2.0
"""Drafts at the end of a step: writes the draft's KV of what is text now, grows trees.

Shapes follow from what the scheduler planned, never from what was accepted. Of every
verified tree as many rows are computed as its deepest path could have; those beyond the
accepted ones leave KV that the next step overwrites before it is read.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model
from vllm.v1.worker.gpu.spec_decode.speculator import (
    BaseSpeculator,
    DraftModelSpeculator,
)
from vllm.v1.worker.gpu.states import RequestState

from vllm_clover2.integration.compat import patches
from vllm_clover2.integration.step import rows_of_text
from vllm_clover2.integration.v2.drafting import DeviceDrafting


def make_speculator(
    vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> BaseSpeculator:
    """In place of vLLM's ``init_speculator``."""
    has_head = vllm_config.speculative_config.has_head
    kind = HeadSpeculator if has_head else ContextSpeculator
    return kind(vllm_config, device, req_states)


class _WithoutGraphs(BaseSpeculator):
    """A speculator that is not captured in CUDA graphs."""

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """None is needed."""

    def capture(self) -> None:
        """Nothing to capture."""


class ContextSpeculator(_WithoutGraphs):
    """Drafts without a head: what followed in the texts before is the only source."""

    draft_logits = None
    supports_mm_inputs = False
    draft_attn_layer_names: frozenset[str] = frozenset()

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        self.drafting = DeviceDrafting(vllm_config, device, req_states)

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,  # [R] int32
        *_: Any,
        dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:  # [R, nodes] int64
        nothing = last_hidden_states[: input_batch.num_reqs, :0]
        if dummy_run:
            return nothing.long()
        return self.drafting.draft(None, nothing, input_batch, num_sampled)


class _TextRows(NamedTuple):
    """The rows that the augmenting block computes, n of R requests."""

    rows: torch.Tensor  # [n] int64 rows of the step
    positions: torch.Tensor  # [n] int64
    next_tokens: torch.Tensor  # [n] int32 token after each
    last: torch.Tensor  # [R] int64 which of these is each request's last of its text
    starts: np.ndarray  # [R + 1] int32 first of each request, and the end


class HeadSpeculator(_WithoutGraphs, DraftModelSpeculator):
    """Drafts with a head, for all requests of a batch at once."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.drafting = DeviceDrafting(vllm_config, device, req_states)
        self._max_depth = self.drafting.options.max_depth
        self._texts = req_states.all_token_ids

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        with patches.named_for_async(self.speculative_config):
            model = load_eagle_model(target_model, self.vllm_config)
        get_language_model = getattr(target_model, "get_language_model", None)
        model.bind_target(get_language_model() if get_language_model else target_model)
        return model

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,  # one [rows, hidden], before the target's final norm
        num_sampled: torch.Tensor,  # [R] int32
        *_: Any,
        dummy_run: bool = False,
        **__: Any,
    ) -> torch.Tensor:  # [R, nodes] int64
        (hidden,) = aux_hidden_states
        if dummy_run:
            return self._dummy_propose(hidden, input_batch.num_reqs)
        states = self._augment(input_batch, hidden, num_sampled)
        return self.drafting.draft(self.model, states, input_batch, num_sampled)

    def _dummy_propose(self, hidden: torch.Tensor, num_reqs: int) -> torch.Tensor:
        """Profile and warm up: one pass over all rows without KV, one growth."""
        buffers, rows = self.input_buffers, len(hidden)
        with set_forward_context(None, self.vllm_config, num_tokens=rows):
            states = self.model(
                buffers.input_ids[:rows], buffers.positions[:rows], hidden
            )
        self.drafting.dummy_draft(self.model, states[:num_reqs])
        return self.draft_tokens[:num_reqs]

    def _augment(
        self, batch: InputBatch, hidden: torch.Tensor, num_sampled: torch.Tensor
    ) -> torch.Tensor:
        """Write the draft's KV of the step's text, [R, hidden] "g" of its last rows."""
        text = self._text_rows(batch, num_sampled)
        requests, rows = batch.num_reqs, len(text.rows)
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping,
            self.input_buffers.query_start_loc[: requests + 1],
            text.positions,
            rows,
        )
        longest = int(batch.seq_lens_cpu_upper_bound[:requests].max())
        self.draft_max_seq_len = min(longest, self.max_model_len)
        metadata = self._build_attn_metadata(
            requests,
            BatchExecutionDescriptor(CUDAGraphMode.NONE, rows, requests),
            text.starts,
            batch.seq_lens_cpu_upper_bound,
            step=0,
            slot_mappings=slots,
        )
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=rows,
            batch_descriptor=BatchDescriptor(num_tokens=rows),
            slot_mapping=build_slot_mappings_by_layer(slots, self.kv_cache_config),
        ):
            states = self.model(text.next_tokens, text.positions, hidden[text.rows])
        return states[text.last]

    def _text_rows(self, batch: InputBatch, num_sampled: torch.Tensor) -> _TextRows:
        """Lay the rows out; leaves starts, positions and lengths in the buffers."""
        count = batch.num_reqs
        buffers, starts_np = self.input_buffers, self._starts(batch)
        rows = int(starts_np[-1])
        starts = buffers.query_start_loc[: count + 1]
        async_tensor_h2d(starts_np, out=starts)

        lengths = starts.diff()
        requests = torch.repeat_interleave(lengths, output_size=rows)
        places = torch.arange(rows, device=self.device) - starts[requests]
        first_rows = batch.query_start_loc[:count].long()
        first_positions = batch.positions[first_rows]
        positions = buffers.positions[:rows]
        torch.add(first_positions[requests], places, out=positions)
        buffers.seq_lens[:count] = first_positions + lengths

        slots, texts = batch.idx_mapping, self._texts.gpu
        after = (positions + 1).clamp(max=texts.shape[1] - 1)
        # The last of so many rows of a request stand for drafts, its root before them.
        levels = (batch.cu_num_logits.diff() - 1).clamp(max=self._max_depth)
        return _TextRows(
            rows_of_text(
                requests,
                places,
                first_rows,
                batch.logits_indices[batch.cu_num_logits[:-1]],
                self.drafting.trees.paths[slots],
            ),
            positions,
            texts[slots[requests], after],
            starts[1:] - 1 - levels + (num_sampled - 1).clamp(min=0),
            starts_np,
        )

    def _starts(self, batch: InputBatch) -> np.ndarray:
        """First row of each request [R + 1] int32, and the end."""
        drafts = batch.num_draft_tokens_per_req
        if drafts is None:
            drafts = np.zeros(batch.num_reqs, dtype=np.int32)
        counts = batch.num_scheduled_tokens - np.maximum(drafts - self._max_depth, 0)
        starts = np.zeros(batch.num_reqs + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        return starts
