# SPDX-License-Identifier: Apache-2.0
"""Runs the draft: the augmenting block over committed rows, then tree growth."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.worker.dp_utils import skip_dp_coordination

from vllm_clover2.integration.backlog import CommittedRows
from vllm_clover2.integration.drafter import COMMITTED_ROWS, MEASURED_REQUESTS, Drafter
from vllm_clover2.tree.grower import TreeGrower

logger = init_logger(f"vllm.{__name__}")


class Clover2Proposer(Drafter, EagleProposer):
    """Drafts with a head, for all requests of a batch at once.

    It is an ``EagleProposer`` because vLLM tells drafts with hidden states and KV of
    their own by that class; loading, KV groups and attention groups are inherited,
    proposing is not.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self.options = self.speculative_config.tree_options()

    def _maybe_share_embeddings(self, target_language_model: nn.Module) -> None:
        self.model.bind_target(target_language_model)

    def _maybe_share_lm_head(self, target_language_model: nn.Module) -> None:
        """Done with the embeddings: both are rows of the target's ``lm_head``."""

    @torch.inference_mode()
    def dummy_run(
        self,
        num_tokens: int,
        use_cudagraphs: bool = True,
        is_graph_capturing: bool = False,
        slot_mappings: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Profile and warm up: one pass over ``num_tokens`` rows, one growth."""
        hidden = self._pass_rows(num_tokens, slot_mappings)
        self._grow(hidden[: self.max_batch_size])

    def _grow(self, hidden: torch.Tensor) -> tuple[int, int]:
        """Grow trees of their full size; returns levels and nodes asked about."""
        growth = TreeGrower(self.options).grow(self.model, hidden, None)
        return growth.levels, growth.asked

    def _pass_rows(
        self, num_rows: int, slot_mappings: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Run the augmenting block over so many rows of the buffers, without KV."""
        with self._forward_context(None, num_rows, slot_mappings or {}):
            return self.model(
                self.input_ids[:num_rows],
                self.positions[:num_rows],
                self.hidden_states[:num_rows],
            )

    @contextlib.contextmanager
    def _forward_context(
        self,
        attention: dict[str, Any] | None,  # metadata by layer; None: without KV
        num_rows: int,
        slots: dict[str, torch.Tensor],  # by layer
    ) -> Iterator[None]:
        """vLLM's, for a pass that other data-parallel ranks do not take part in.

        With a target that has experts every pass is agreed on by all ranks. A head has
        none, and ranks without requests do not draft.
        """
        with (
            skip_dp_coordination(),
            set_forward_context(
                attention, self.vllm_config, num_tokens=num_rows, slot_mapping=slots
            ),
        ):
            yield

    def augment(
        self,
        committed: CommittedRows,
        step: CommonAttentionMetadata,
        block_size: int,
    ) -> torch.Tensor:
        """Write the draft's KV of committed rows.

        ``step`` is the metadata of the whole batch's last pass, ``block_size`` the
        number of tokens in one entry of its block table. Returns "g" of the last
        row of every request in ``committed``, [requests, hidden].

        """
        states = [
            self._augment(part, step, block_size)
            for part in committed.split(self.max_num_tokens)
        ]
        # Of a request that was split, the last part has the last row.
        last = np.cumsum(committed.counts) - 1
        return torch.cat(states)[self._to_device(last)]

    def _augment(
        self, rows: CommittedRows, step: CommonAttentionMetadata, block_size: int
    ) -> torch.Tensor:
        """One pass of the augmenting block, "g" of all rows [n, hidden]."""
        metadata = self._attention_metadata(rows, step, block_size)
        layers = {
            name: group_metadata
            for group, group_metadata in metadata
            for name in group.layer_names
        }
        slots = metadata[0][1].slot_mapping
        of_layers = dict.fromkeys(self._draft_attn_layer_names, slots)
        with self._forward_context(layers, len(rows.positions), of_layers):
            return self.model(
                self._to_device(rows.next_tokens),
                self._to_device(rows.positions),
                rows.hidden,
            )

    def cost_parts(self) -> list[Callable[[], Any]]:
        few, many = self._measured_states()
        return [
            functools.partial(self._pass_rows, len(few)),
            functools.partial(self._pass_rows, len(many)),
            functools.partial(self._grow, few),
            functools.partial(self._grow, many),
        ]

    def drafting_costs(self, seconds: list[float]) -> tuple[float, float, float, float]:
        one, several, grow_one, grow_many = seconds
        few, many = self._measured_states()
        per_row = max(several - one, 0.0) / max(len(many) - 1, 1)
        levels, nodes = self._grow(few)
        _, more = self._grow(many)
        per_node = max(grow_many - grow_one, 0.0) / max(more - nodes, 1)
        per_level = max(grow_one - nodes * per_node, 0.0) / levels
        logger.info(
            "clover2: drafting takes %.1f ms for one request", 1e3 * (one + grow_one)
        )
        return max(one - per_row, 0.0), per_row, per_level, per_node

    def _measured_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of one request and of several, to measure with."""
        return self.hidden_states[:1], self.hidden_states[:MEASURED_REQUESTS]

    def named_parts(self) -> dict[str, Callable[[], Any]]:
        """A dynamic tree grows to its full depth, which is the most it can take."""
        return {
            f"augment_{COMMITTED_ROWS}": functools.partial(
                self._pass_rows, COMMITTED_ROWS
            ),
            "grow": functools.partial(self._grow, self.hidden_states[:1]),
        }

    def _attention_metadata(
        self,
        committed: CommittedRows,
        step: CommonAttentionMetadata,
        block_size: int,
    ) -> list[tuple[Any, Any]]:
        """Attention metadata of each of the draft's attention groups."""
        counts = committed.counts
        num_reqs = len(counts)
        starts = np.zeros(num_reqs + 1, dtype=np.int32)
        np.cumsum(counts, out=starts[1:])
        lengths = (committed.positions[starts[1:] - 1] + 1).astype(np.int32)
        positions = self._to_device(committed.positions)
        blocks = step.block_table_tensor[
            self._to_device(committed.requests), positions // block_size
        ]
        table = step.block_table_tensor[
            self._to_device(committed.requests[starts[:-1]])
        ]
        draft_step = CommonAttentionMetadata(
            query_start_loc=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self._to_device(lengths),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=num_reqs,
            num_actual_tokens=len(committed.positions),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=table,
            slot_mapping=blocks.long() * block_size + positions % block_size,
            causal=True,
            positions=positions,
        )
        return [
            (group, group.get_metadata_builder().build(0, draft_step))
            for group in self.draft_attn_groups
        ]

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Host array -> device; no copy on CPU, asynchronous on CUDA."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
