# SPDX-License-Identifier: Apache-2.0
"""Drafts at the end of a step: writes the draft's KV of what is text now, grows trees.

Shapes follow from what the scheduler planned, never from what was accepted. Of every
verified tree as many rows are computed as its deepest path could have; those beyond the
accepted ones leave KV that the next step overwrites before it is read.

Both halves are replayed as CUDA graphs: growing always, the draft's KV where all
requests of the batch verified equally many nodes, so that they have equally many rows.
Where the scheduler wants no drafts only the draft's KV is written.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer
from vllm.v1.worker.gpu.cudagraph_utils import (
    BatchExecutionDescriptor,
    prepare_inputs_to_capture,
)
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
from vllm_clover2.integration.v2.graphs import DraftingGraphs

logger = init_logger(f"vllm.{__name__}")


def make_speculator(
    vllm_config: VllmConfig, device: torch.device, req_states: RequestState
) -> BaseSpeculator:
    """In place of vLLM's ``init_speculator``."""
    has_head = vllm_config.speculative_config.has_head
    kind = HeadSpeculator if has_head else ContextSpeculator
    return kind(vllm_config, device, req_states)


class ContextSpeculator(BaseSpeculator):
    """Drafts without a head: what followed in the texts before is the only source."""

    draft_logits = None
    supports_mm_inputs = False
    draft_attn_layer_names: frozenset[str] = frozenset()

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        self._vllm_config, self._device = vllm_config, device
        self.drafting = DeviceDrafting(vllm_config, device, req_states)
        self.growth_graphs: DraftingGraphs

    def parts_to_time(self, few: int, many: int) -> list[Callable[[], Any]]:
        """Growing trees for so many requests."""
        grow = partial(self.drafting.grow_for_nobody, None, graphs=self.growth_graphs)
        return [partial(grow, few), partial(grow, many)]

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        self.growth_graphs = DraftingGraphs(
            self._vllm_config, self._device, cudagraph_mode, rows=1
        )

    def capture(self) -> None:
        self.growth_graphs.capture_part(
            partial(self.drafting.part_for, None), "growing trees"
        )

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
        num_speculative_tokens: int | None = None,  # nodes that can be verified
        **__: Any,
    ) -> torch.Tensor:  # [R, nodes] int64
        nothing = last_hidden_states[: input_batch.num_reqs, :0]
        if dummy_run:
            return nothing.long()
        if num_speculative_tokens == 0:
            return self.drafting.no_tokens(input_batch)
        return self.drafting.draft(
            None, nothing, input_batch, num_sampled, self.growth_graphs
        )


class _TextRows(NamedTuple):
    """The rows that the augmenting block computes, n of R requests."""

    rows: torch.Tensor  # [n] int64 rows of the step
    positions: torch.Tensor  # [n] int64
    next_tokens: torch.Tensor  # [n] int32 token after each
    last: torch.Tensor  # [R] int64 which of these is each request's last of its text
    starts: np.ndarray  # [R + 1] int32 first of each request, and the end


class HeadSpeculator(DraftModelSpeculator):
    """Drafts with a head, for all requests of a batch at once."""

    growth_graphs: DraftingGraphs
    augment_graphs: dict[int, DraftingGraphs]  # by rows of each request

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.drafting = DeviceDrafting(vllm_config, device, req_states)
        self._max_depth = self.drafting.options.max_depth
        self._texts = req_states.all_token_ids
        # What graphs read besides vLLM's input buffers.
        self._hidden = torch.empty(0)
        self._last = torch.zeros(self.max_num_reqs, dtype=torch.int64, device=device)

    def load_draft_model(
        self, target_model: torch.nn.Module, target_attn_layer_names: set[str]
    ) -> torch.nn.Module:
        with patches.named_for_async(self.speculative_config):
            model = load_eagle_model(target_model, self.vllm_config)
        get_language_model = getattr(target_model, "get_language_model", None)
        model.bind_target(get_language_model() if get_language_model else target_model)
        return model

    @property
    def attn_vllm_config(self) -> VllmConfig:
        """Of the draft's attention, which keeps its plans in place for whole graphs."""
        config = copy.copy(super().attn_vllm_config)
        if config.compilation_config.cudagraph_mode:
            compilation = copy.copy(config.compilation_config)
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
            config.compilation_config = compilation
        return config

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        make = partial(DraftingGraphs, self.vllm_config, self.device)
        self.growth_graphs = make(cudagraph_mode, rows=1)
        support = self.attn_cg_support.min_cg_support
        if support.value < AttentionCGSupport.UNIFORM_BATCH.value:
            logger.info_once("clover2: the draft's attention stays outside CUDA graphs")
            cudagraph_mode = CUDAGraphMode.NONE
        widths = self.speculative_config.scheduled_widths()
        self.augment_graphs = {
            rows: make(cudagraph_mode, rows=rows)
            for rows in sorted({1 + min(w, self._max_depth) for w in widths})
        }
        largest = self.vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self._hidden = torch.zeros(
            largest, self.hidden_size, dtype=self.dtype, device=self.device
        )

    def capture(self) -> None:
        for rows, graphs in self.augment_graphs.items():
            graphs.capture_part(self._augment_part_for, f"draft's KV, {rows} rows")
        self.growth_graphs.capture_part(
            partial(self.drafting.part_for, self.model), "growing trees"
        )

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor] | None,
        last_hidden_states: torch.Tensor,
        aux_hidden_states: Any,  # each [rows, hidden], before the target's final norm
        num_sampled: torch.Tensor,  # [R] int32
        *_: Any,
        dummy_run: bool = False,
        num_speculative_tokens: int | None = None,  # nodes that can be verified
        **__: Any,
    ) -> torch.Tensor:  # [R, nodes] int64
        hidden = self.model.read(aux_hidden_states)
        if dummy_run:
            return self._dummy_propose(hidden, input_batch.num_reqs)
        states = self._augment(input_batch, hidden, num_sampled)
        if num_speculative_tokens == 0:
            return self.drafting.no_tokens(input_batch)
        return self.drafting.draft(
            self.model, states, input_batch, num_sampled, self.growth_graphs
        )

    def _dummy_propose(self, hidden: torch.Tensor, num_reqs: int) -> torch.Tensor:
        """Profile and warm up: one pass over all rows without KV, one growth."""
        states = self._pass_rows(hidden)
        self.drafting.dummy_draft(self.model, states[:num_reqs])
        return self.draft_tokens[:num_reqs]

    def _pass_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """Run the augmenting block over rows of the buffers, without KV."""
        rows = len(hidden)
        with set_forward_context(None, self.vllm_config, num_tokens=rows):
            states: torch.Tensor = self.model(
                self.input_buffers.input_ids[:rows],
                self.input_buffers.positions[:rows],
                hidden,
            )
        return states

    def parts_to_time(self, few: int, many: int) -> list[Callable[[], Any]]:
        """Growing trees for so many requests, augmenting so many rows."""
        grow = partial(
            self.drafting.grow_for_nobody, self.model, graphs=self.growth_graphs
        )
        hidden = torch.zeros(
            many, self.hidden_size, dtype=self.dtype, device=self.device
        )
        return [
            partial(grow, few),
            partial(grow, many),
            partial(self._pass_rows, hidden[:few]),
            partial(self._pass_rows, hidden),
        ]

    def _augment(
        self, batch: InputBatch, hidden: torch.Tensor, num_sampled: torch.Tensor
    ) -> torch.Tensor:
        """Write the draft's KV of the step's text, [R, hidden] "g" of its last rows."""
        text = self._text_rows(batch, num_sampled)
        requests, rows = batch.num_reqs, len(text.rows)
        graphs, size = None, None
        if (np.diff(text.starts) == text.starts[1]).all():
            graphs = self.augment_graphs.get(int(text.starts[1]))
        if graphs is not None:
            size = graphs.size_for(requests)
        shape = size or BatchExecutionDescriptor(CUDAGraphMode.NONE, rows, requests)
        buffers = self.input_buffers
        slots = self.block_tables.compute_slot_mappings(
            batch.idx_mapping,
            buffers.query_start_loc[: requests + 1],
            text.positions,
            shape.num_tokens,
        )
        longest = int(batch.seq_lens_cpu_upper_bound[:requests].max())
        self.draft_max_seq_len = min(longest, self.max_model_len)
        # A graph has its own; what these plan is kept where it reads it.
        metadata = self._build_attn_metadata(
            requests,
            shape,
            text.starts,
            batch.seq_lens_cpu_upper_bound,
            step=0,
            slot_mappings=slots,
        )
        if graphs is None or size is None:
            by_layer = build_slot_mappings_by_layer(slots, self.kv_cache_config)
            inputs = text.next_tokens, text.positions, hidden[text.rows]
            return self._run(metadata, by_layer, *inputs)[text.last]
        buffers.input_ids[:rows] = text.next_tokens
        self._hidden[:rows] = hidden[text.rows]
        self._last[:requests] = text.last
        self._last[requests:] = 0  # the row is there, however few rows a graph has
        return graphs.replay(size)[:requests]

    def _augment_part_for(
        self, size: BatchExecutionDescriptor
    ) -> Callable[[], torch.Tensor]:
        """What a graph does: the same for whole trees of the text in the buffers."""
        requests, rows = size.num_reqs or 0, size.num_tokens
        metadata, by_layer = prepare_inputs_to_capture(
            requests,
            rows,
            self.model_state,
            self.input_buffers,
            self.block_tables,
            self.attn_groups,
            self.kv_cache_config,
            full_cudagraph=True,
            max_query_len=size.uniform_token_count,
        )
        buffers, last = self.input_buffers, self._last[:requests]
        last.zero_()

        def part() -> torch.Tensor:
            inputs = buffers.input_ids[:rows], buffers.positions[:rows]
            return self._run(metadata, by_layer, *inputs, self._hidden[:rows])[last]

        return part

    def _run(
        self,
        metadata: dict[str, Any] | None,
        slot_mappings: dict[str, torch.Tensor],
        next_tokens: torch.Tensor,  # [rows] int32
        positions: torch.Tensor,  # [rows] int64
        hidden: torch.Tensor,  # [rows, hidden] of the target
    ) -> torch.Tensor:  # [rows, hidden] "g"
        rows = len(hidden)
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=rows,
            batch_descriptor=BatchDescriptor(num_tokens=rows),
            slot_mapping=slot_mappings,
        ):
            states: torch.Tensor = self.model(next_tokens, positions, hidden)
        return states

    def _text_rows(self, batch: InputBatch, num_sampled: torch.Tensor) -> _TextRows:
        """Lay the rows out; leaves starts, positions and lengths in the buffers."""
        count = batch.num_reqs
        buffers, starts_np = self.input_buffers, self._starts(batch)
        rows = int(starts_np[-1])
        starts = buffers.query_start_loc[: count + 1]
        async_tensor_h2d(starts_np, out=starts)
        # Requests that pad the batch have no rows.
        buffers.query_start_loc[count + 1 :] = rows
        buffers.seq_lens[count:] = 0

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
