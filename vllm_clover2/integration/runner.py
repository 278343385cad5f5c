# SPDX-License-Identifier: Apache-2.0
"""One step of Clover-2 on vLLM's Model Runner V1, for CPU and CUDA.

The stock runner calls, in this order: ``_prepare_inputs`` (we set tree positions),
``_build_attention_metadata`` (we attach the trees), the target's forward, ``_sample``
(we accept a path and commit its KV), ``_bookkeeping_sync`` and
``propose_draft_token_ids`` (we run the draft). No stock method is copied.
"""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_clover2 import ops
from vllm_clover2.integration import layer_limits, stats, step
from vllm_clover2.integration.backlog import CommittedRows
from vllm_clover2.integration.compat import patches, surface
from vllm_clover2.integration.drafting import Drafting, FinishedStep
from vllm_clover2.integration.proposer import Clover2Proposer
from vllm_clover2.integration.request_sampling import (
    RequestSampling,
    opaque_processor,
)
from vllm_clover2.integration.sampling import AcceptedPaths, accept_paths
from vllm_clover2.integration.verify import (
    Draft,
    DraftStore,
    VerifyBatch,
    likeliest_path,
)
from vllm_clover2.tree.step_cost import Work
from vllm_clover2.tree.types import Source

logger = init_logger(f"vllm.{__name__}")


class Clover2RunnerMixin:
    """Overrides of ``GPUModelRunner`` (V1); mixed in front of the platform's runner."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        surface.check_signatures(surface.EXPECTED_WORKER)
        with (
            patches.let_runner_make(vllm_config.speculative_config),
            patches.all_logits_processors(),
        ):
            super().__init__(vllm_config, device)
        if vllm_config.speculative_config.has_head:
            self.drafter = Clover2Proposer(vllm_config, device, self)
            # The draft reads the target's hidden state before its final norm, which
            # vLLM hands out the way EAGLE-3 asks for intermediate layers.
            self.use_aux_hidden_state_outputs = True
        depth = vllm_config.speculative_config.tree_options().max_depth
        self.stats = stats.WorkerStats(depth)
        self.drafts = DraftStore(self.stats.counts)
        self._batch: VerifyBatch | None = None
        self._sampling: RequestSampling | None = None
        self._accepted: AcceptedPaths | None = None

    # Set-up

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        draft_layers = self.drafter._draft_attn_layer_names
        layers = get_layers_from_vllm_config(
            self.vllm_config,
            AttentionLayerBase,  # type: ignore[type-abstract]
        )
        self._target_layers = {
            name: layer for name, layer in layers.items() if name not in draft_layers
        }
        if self.drafter.options.tree != "chain":
            layer_limits.refuse_unsuitable_layers(
                self._target_layers.values(), self.device.type
            )
        logger.info(
            "clover2: %s, ops run %s",
            self.drafter.options,
            ops.backend(self.device.type),
        )

    def initialize_kv_cache(
        self, kv_cache_config: Any, *args: Any, **kwargs: Any
    ) -> None:
        layer_limits.refuse_scattered_head(
            kv_cache_config, self.drafter._draft_attn_layer_names
        )
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.drafter.options.tree != "chain":
            layer_limits.refuse_kv_with_gaps(
                self._target_layers.values(), self.device.type
            )
        # The target's layers by KV group: each group has its own blocks.
        self._layers_by_group = {
            gid: layers
            for gid, group in enumerate(self.kv_cache_config.kv_cache_groups)
            if (
                layers := [
                    self._target_layers[name]
                    for name in group.layer_names
                    if name in self._target_layers
                ]
            )
        }
        block_size = self._draft_blocks.block_size
        self.drafting = Drafting(self.drafter, block_size, self.stats)
        # The same for all steps: it follows from the classes that were loaded.
        self._opaque_processor = opaque_processor(self.input_batch.logitsprocs)
        holder = self.input_batch.thinking_budget_state_holder
        if holder is not None:
            # Its rows follow requests, not drafts: we sample level by level, and
            # requests with a budget are not drafted for.
            holder.in_spec_mode = False

    @functools.cached_property
    def _least_requests(self) -> float:
        """Requests from which on our attention takes rows that are in no tree.

        In float32 on a CPU it reads them faster than vLLM's (``kernels/cpu/timing.py``)
        once every thread has a KV head to itself. 16-bit rows without a tree keep
        vLLM's own rounding.
        """
        if self.device.type != "cpu" or self.dtype != torch.float32:
            return math.inf
        if self.drafter.options.tree == "chain":  # layers were not checked for trees
            return math.inf
        heads = self.model_config.get_num_kv_heads(self.parallel_config)
        return torch.get_num_threads() / heads

    @property
    def _draft_blocks(self) -> Any:
        """The block table of the KV group that a head's layers are in."""
        return self.input_batch.block_table[self.drafter.kv_cache_gid]

    @torch.inference_mode()
    def measure_cost(self) -> None:
        """Measure what steps cost, for adaptive trees; call once, after warm-up."""
        if (cost := self.drafter.measure_cost(self._pass_rows)) is not None:
            self.drafting.adapt_to(cost)

    @torch.inference_mode()
    def measure_parts(self) -> dict[str, float]:
        """Seconds of the parts of one request's step, measured now."""
        return self.drafter.measure_parts(self._pass_rows)

    def counts(self) -> dict[str, int]:
        """See ``Clover2WorkerMixin.clover2_stats``."""
        return dict(self.stats.counts)

    def step_milliseconds(self) -> dict[int, float]:
        """See ``Clover2WorkerMixin.clover2_step_milliseconds``."""
        chooser = self.drafting.chooser
        if chooser is None:
            return {}
        return chooser.cost.milliseconds()

    def _pass_rows(self, num_rows: int) -> None:
        """Run the target over so many rows, output head included, without KV."""
        tokens, embeddings = self.input_ids.gpu[:num_rows], None
        if self.enable_prompt_embeds:  # a compiled target knows one of the two only
            tokens, embeddings = None, self.inputs_embeds.gpu[:num_rows]
        if self.lora_config:  # which rows have adapters is told before every pass
            without = (0,) * num_rows
            self._set_active_loras(without, without, set())
        with set_forward_context(None, self.vllm_config, num_tokens=num_rows):
            hidden_states = self._model_forward(
                input_ids=tokens,
                positions=self.positions[:num_rows],
                inputs_embeds=embeddings,
            )
        if self.use_aux_hidden_state_outputs:
            hidden_states, _ = hidden_states
        self.model.compute_logits(hidden_states)

    def _input_fits_in_drafter(self, common_attn_metadata: Any) -> bool:
        # The stock test stops drafting for the whole batch, for good, once any
        # request is near the length limit; drafts of ours never pass the limit,
        # because the scheduler trims them and the draft's KV is committed text.
        return common_attn_metadata is not None

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.drafts.drop(req_id)
        self.drafting.forget(req_id)

    # Verify

    def _prepare_inputs(
        self, scheduler_output: Any, num_scheduled_tokens: np.ndarray
    ) -> Any:
        self.drafting.clock.begin()
        prepared = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        logits_indices = prepared[0]
        spec_tokens = scheduler_output.scheduled_spec_decode_tokens
        num_reqs = self.input_batch.num_reqs
        batch = VerifyBatch.build(
            [
                self.drafts.scheduled(
                    req_id, self.requests[req_id].num_tokens, spec_tokens[req_id]
                )
                if spec_tokens.get(req_id)
                else None
                for req_id in self.input_batch.req_ids
            ],
            self.input_batch.num_computed_tokens_cpu[:num_reqs],
            num_scheduled_tokens,
        )
        # Only RoPE follows depth. KV slots were computed from the linear positions
        # that the stock method has just used, one slot a row.
        batch = batch.to(self.device)
        self.positions[logits_indices.long()] = batch.positions()
        self._batch = batch
        return prepared

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        per_layer, common = super()._build_attention_metadata(*args, **kwargs)
        if self._batch is not None and common is not None:
            trees = self._batch.tree_rows(self._least_requests)
            for metadata in {id(m): m for m in per_layer.values()}.values():
                metadata.clover2_trees = trees
        return per_layer, common

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        output = super().sample_tokens(*args, **kwargs)
        stats.attach(output, self.stats)
        return output

    def _sample(self, logits: torch.Tensor, spec_decode_metadata: Any) -> Any:
        batch = self._batch
        num_reqs = self.input_batch.num_reqs
        if self._sampling is None or not self._sampling.holds_for(self.input_batch):
            self._sampling = RequestSampling(self.input_batch)
        self._accepted = accept_paths(
            self.sampler,
            logits,
            self._sampling,
            batch,
            self.discard_request_mask.np[:num_reqs],
        )
        if len(batch.tree_requests):
            self._commit(batch, self._accepted)
        return self._accepted.output

    def _commit(self, batch: VerifyBatch, accepted: AcceptedPaths) -> None:
        """Move the accepted rows' KV, group by group."""
        roots = torch.from_numpy(batch.root_positions).to(
            self.device, non_blocking=True
        )
        for gid, layers in self._layers_by_group.items():
            blocks = self.input_batch.block_table[gid]
            step.commit(
                layers,
                blocks.get_device_tensor(batch.num_requests),
                roots,
                accepted.paths,
                accepted.lengths,
            )

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        # For a request in the middle of its prompt the stock method rewinds the
        # generator by one draw, which kills the engine on CPU (its generators have no
        # offset). Ours drew nothing for it, so there is nothing to rewind.
        generators = self.input_batch.generators
        discarded = np.flatnonzero(
            self.discard_request_mask.np[: self.input_batch.num_reqs]
        )
        hidden = {int(i): generators.pop(int(i)) for i in discarded if i in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)

    # Draft

    def propose_draft_token_ids(
        self,
        scheduler_output: Any,
        sampled_token_ids: list[list[int]],
        sampling_metadata: Any,
        hidden_states: torch.Tensor,
        sample_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,  # None without a head
        spec_decode_metadata: Any,
        common_attn_metadata: Any,
        slot_mappings: Any,
    ) -> list[list[int]]:
        verified_after = self.drafting.clock.elapsed
        if self._batch.max_depth:
            self.stats.observe(stats.VERIFICATION_SECONDS, verified_after)
        before_norm = None
        if aux_hidden_states:
            before_norm = self.drafter.model.read(aux_hidden_states)
        finished = self._finished_step(
            sampled_token_ids, before_norm, common_attn_metadata
        )
        self._batch = self._accepted = None
        max_nodes = scheduler_output.num_spec_tokens_to_schedule
        may_draft = len(finished.drafted)
        if not max_nodes:  # by vLLM's own table, for so many requests
            finished = dataclasses.replace(finished, drafted=[])
        grown = self.drafting.draft(finished)
        held_back = self.drafting.held_back if max_nodes else may_draft
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        sizes = grown.sizes.clamp(max=max_nodes).tolist()
        tokens, parents = grown.tokens.tolist(), grown.parents.cpu().numpy()
        sources = grown.sources.cpu().numpy()
        for row, request in enumerate(finished.drafted):
            size = sizes[row]
            proposals[request] = self._remember(
                self.input_batch.req_ids[request],
                tokens[row][:size],
                parents[row, :size],
                sources[row, :size],
            )
        for request, proposal in enumerate(proposals):
            if not proposal:
                self.drafts.drop(self.input_batch.req_ids[request])
        drafted = sum(map(bool, proposals))
        self.stats.count(
            stats.REQUESTS,
            {
                "drafted": drafted,
                "load": held_back,
                "nothing found": may_draft - drafted - held_back,
                "excluded": sum(map(bool, sampled_token_ids)) - may_draft,
            },
        )
        seconds = self.drafting.clock.elapsed - verified_after
        self.stats.observe(stats.DRAFTING_SECONDS, seconds)
        return proposals

    def _finished_step(
        self,
        sampled_token_ids: list[list[int]],
        hidden_states: torch.Tensor | None,  # [rows, hidden], for a head
        attention: Any,
    ) -> FinishedStep:
        """What drafting has to know of the step; call after the stock bookkeeping."""
        batch, accepted = self._batch, self._accepted
        paths, path_lengths = accepted.paths.cpu().numpy(), accepted.lengths.cpu()
        self._count_accepted(batch, paths)
        num_reqs = batch.num_requests
        requests = list(self.input_batch.req_ids)
        lengths = self.input_batch.num_tokens_no_spec[:num_reqs].astype(np.int32)
        blocks = self._draft_blocks
        prompt_rows = batch.query_rows - int(batch.row_counts.sum())
        return FinishedStep(
            requests=requests,
            drafted=[
                index
                for index, sampled in enumerate(sampled_token_ids)
                if sampled and self._may_draft(requests[index])
            ],
            emitted=sampled_token_ids,
            token_ids=self.input_batch.token_ids_cpu_tensor,
            lengths=lengths,
            committed=None
            if hidden_states is None
            else self._committed_rows(
                batch, paths, path_lengths.numpy(), hidden_states
            ),
            block_table=blocks.get_cpu_tensor().numpy()[:num_reqs],
            attention=attention,
            block_size=blocks.block_size,
            work=Work(batch.query_rows, prompt_rows, int(batch.root_positions.sum())),
            prompt_rows=min(prompt_rows, self._prompt_rows_left(sampled_token_ids)),
        )

    def _prompt_rows_left(self, sampled_token_ids: list[list[int]]) -> int:
        """Rows of prompts that this step did not reach."""
        left = [
            self.requests[req_id].num_tokens
            for req_id, sampled in zip(self.input_batch.req_ids, sampled_token_ids)
            if not sampled
        ]
        return sum(left)

    def _may_draft(self, req_id: str) -> bool:
        reason = self._why_not_drafted(self.requests[req_id])
        if reason is not None:
            self.drafts.fell_back(f"{reason}: not drafted")
        return reason is None

    def _why_not_drafted(self, request: Any) -> str | None:
        if request.sampling_params.thinking_token_budget is not None:
            return "thinking budget"
        if request.prompt_embeds is not None:
            return "prompt embeddings"  # no source knows the tokens of the prompt
        if self._opaque_processor is not None:
            return f"logits processor {type(self._opaque_processor).__name__}"
        return None

    def _count_accepted(self, batch: VerifyBatch, paths: np.ndarray) -> None:
        """Count verified and accepted nodes, and where in their trees these stood."""
        if not batch.max_depth:
            return
        offsets = np.cumsum(batch.row_counts) - batch.row_counts
        rows = (paths + offsets[:, None])[paths > 0]
        for kind, sources in (
            (stats.VERIFIED, batch.sources),
            (stats.ACCEPTED, batch.sources[rows]),
        ):
            self.stats.count(
                kind, {s.name.lower(): int((sources == s).sum()) for s in Source}
            )
        depths = (paths > 0).sum(axis=1)[batch.row_counts > 1]
        self.stats.observe(stats.ACCEPTED_DEPTH, *depths.tolist())
        self.stats.observe(stats.SIBLING_RANK, *batch.ranks[rows].tolist())

    def _remember(
        self, req_id: str, tokens: list[int], parents: np.ndarray, sources: np.ndarray
    ) -> list[int]:
        """Keep a grown tree for the next step; returns what to send the scheduler."""
        request = self.requests[req_id]
        params = request.sampling_params
        is_chain = self.drafter.options.tree == "chain"
        if params.structured_outputs is not None and not is_chain:
            # vLLM reads the drafts of such a request as one string when it builds
            # the grammar's mask, so siblings would be misread.
            self.drafts.fell_back("structured output: drafted as a chain")
            path = likeliest_path(parents)
            tokens = [tokens[row - 1] for row in path]
            sources = sources[[row - 1 for row in path]]
            parents = np.arange(len(path), dtype=np.int32)
            is_chain = True
        self.drafts.put(
            req_id, Draft(request.num_tokens, tokens, parents, sources, is_chain)
        )
        return tokens

    def _committed_rows(
        self,
        batch: VerifyBatch,
        paths: np.ndarray,  # [num_reqs, depth] accepted rows
        path_lengths: np.ndarray,  # [num_reqs]
        hidden_states: torch.Tensor,  # [rows, hidden]
    ) -> CommittedRows:
        """Rows of the step that are text now; call after the stock bookkeeping.

        Of each request the scheduled prompt rows or its root, then the accepted nodes
        in path order.
        """
        num_reqs = batch.num_requests
        starts = self.query_start_loc.np[:num_reqs].astype(np.int64)
        first_positions = self.input_batch.num_computed_tokens_cpu[:num_reqs]
        # Up to and including the root; further rows are accepted nodes.
        upto_root = batch.root_query_rows - starts + 1
        counts = (upto_root + path_lengths).astype(np.int32)

        requests = np.repeat(np.arange(num_reqs), counts)
        ends = np.cumsum(counts)
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        rows = step.rows_of_text(
            *map(
                torch.from_numpy,
                (requests, within, starts, batch.root_query_rows, paths),
            )
        )
        positions = first_positions[requests].astype(np.int64) + within
        next_tokens = self.input_batch.token_ids_cpu[requests, positions + 1]
        on_device = rows.to(hidden_states.device, non_blocking=True)
        return CommittedRows(
            hidden_states[on_device],
            requests,
            positions,
            counts,
            next_tokens.astype(np.int64),
        )
