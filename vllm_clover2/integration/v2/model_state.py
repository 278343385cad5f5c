# SPDX-License-Identifier: Apache-2.0
"""How the target sees the trees of a step, and what becomes of the accepted rows."""

from typing import Any

import torch
from vllm.config import CUDAGraphMode, VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_clover2.integration import step
from vllm_clover2.integration.attention import TreeRows
from vllm_clover2.integration.limits import refuse
from vllm_clover2.integration.v2.graphs import TreesInGraphs
from vllm_clover2.integration.v2.sampling import TreeRejectionSampler
from vllm_clover2.integration.v2.speculator import ContextSpeculator, HeadSpeculator

_STOCK_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)


class Clover2ModelState(DefaultModelState):
    """``DefaultModelState`` whose drafted rows are trees.

    KV slots follow vLLM's linear positions, one slot a row; only RoPE, attention and
    noise follow depth.
    """

    def __init__(
        self,
        speculator: HeadSpeculator | ContextSpeculator,
        vllm_config: VllmConfig,
        model: torch.nn.Module,
        encoder_cache: Any,
        device: torch.device,
    ) -> None:
        _refuse_own_states(vllm_config, model)
        super().__init__(vllm_config, model, encoder_cache, device)
        self._drafting = speculator.drafting
        self._trees = speculator.drafting.trees
        self._branches = speculator.drafting.branches
        self._positions = torch.zeros(
            self.max_num_tokens, dtype=torch.int64, device=device
        )
        self._in_graphs = TreesInGraphs(self.max_num_reqs, self.max_num_tokens, device)
        layers = get_layers_from_vllm_config(
            vllm_config,
            AttentionLayerBase,  # type: ignore[type-abstract]
        )
        self._draft_layer_names = speculator.draft_attn_layer_names
        self.target_layers = [
            layer
            for name, layer in layers.items()
            if name not in self._draft_layer_names
        ]

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._drafting.add_request(req_index, new_req_data.sampling_params)

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()
        self._drafting.apply_staged_writes()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, block_tables: BlockTables
    ) -> None:
        super().initialize_kv_cache(kv_cache_config, block_tables)
        self._block_tables = block_tables

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, TreeRejectionSampler]:
        if not all(isinstance(p, _STOCK_PROCESSORS) for p in sampler.logits_processors):
            # What others make of drafted rows is not known.
            self._drafting.chains_for_all = True
        spec_config = self.vllm_config.speculative_config
        ours = TreeRejectionSampler(sampler, spec_config, self.device, self._trees)
        return sampler, ours

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs(input_batch, req_states)
        if not self._branches:
            return inputs
        positions = self._positions[: input_batch.num_tokens_after_padding]
        positions.copy_(input_batch.positions)
        if input_batch.num_draft_tokens:
            numbers = input_batch.expanded_local_pos
            rows = self._trees.rows(input_batch.expanded_idx_mapping, numbers)
            difference = (rows.depths - numbers).long()
            positions.index_add_(0, input_batch.logits_indices, difference)
        return inputs | {"positions": positions}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        inputs = super().prepare_dummy_inputs(num_reqs, num_tokens)
        if not self._branches:
            return inputs
        return inputs | {"positions": self._positions[:num_tokens]}

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        *args: Any,
        for_capture: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        per_layer = super().prepare_attn(
            input_batch, cudagraph_mode, *args, for_capture=for_capture, **kwargs
        )
        if not self._branches:
            return per_layer
        trees = None
        if for_capture:
            # Batches without drafts have graphs too, with vLLM's own attention.
            if input_batch.num_tokens > input_batch.num_reqs:
                trees = self._in_graphs.rows_of(input_batch)
        elif input_batch.num_draft_tokens:
            trees = self._tree_rows(input_batch)
            if cudagraph_mode == CUDAGraphMode.FULL:
                self._in_graphs.fill(trees)
        for name, metadata in per_layer.items():
            if name not in self._draft_layer_names:  # those see the text alone
                metadata.clover2_trees = trees
        return per_layer

    def _tree_rows(self, batch: InputBatch) -> TreeRows:
        """All rows with logits as trees; one that has no drafts is a mere root."""
        roots = batch.logits_indices[batch.cu_num_logits[:-1]]
        rows = self._trees.rows(batch.expanded_idx_mapping, batch.expanded_local_pos)
        return TreeRows(
            requests=None,
            prefix_lens=batch.positions[roots].int(),
            query_starts=roots.int(),
            row_offsets=batch.cu_num_logits,
            ancestors=rows.ancestors,
            covers_batch=len(batch.logits_indices) == batch.num_tokens,
        )

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,  # [R] int64 slots
        num_sampled: torch.Tensor,  # [R] int32 emitted tokens
        num_computed_tokens: torch.Tensor | None = None,  # [slots] int32
    ) -> None:
        super().postprocess_state(idx_mapping, num_sampled, num_computed_tokens)
        if self._branches and num_computed_tokens is not None:
            step.commit(
                self.target_layers,
                self._block_tables.input_block_tables[0][: len(idx_mapping)],
                num_computed_tokens[idx_mapping] - num_sampled,
                self._trees.paths[idx_mapping],
                (num_sampled - 1).clamp(min=0),
            )


def _refuse_own_states(vllm_config: VllmConfig, model: torch.nn.Module) -> None:
    """Raise for a target that keeps a state of its own from step to step.

    Raises:
        ValueError: names the class of the state.

    """
    state = resolve_model_state_cls(vllm_config, model)
    reason = (
        f"targets with a state of their own ({state.__name__}) on Model Runner V2; "
        f"set VLLM_USE_V2_MODEL_RUNNER=0"
    )
    refuse([] if state is DefaultModelState else [reason])
