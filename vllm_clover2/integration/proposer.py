# SPDX-License-Identifier: Apache-2.0
"""Runs the draft: the augmenting block over committed rows, then tree growth."""

import functools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from vllm_clover2.integration.backlog import CommittedRows
from vllm_clover2.tree.grower import TreeGrower
from vllm_clover2.tree.step_cost import StepCost
from vllm_clover2.tree.types import GrownTrees

_COMMITTED_ROWS = 3
"""A step commits its root and the accepted nodes: two or three rows."""
_MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MEASURED_REQUESTS = 8

logger = init_logger(f"vllm.{__name__}")


class Clover2Proposer(EagleProposer):
    """Drafts for all requests of a batch at once.

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
        with set_forward_context(
            None,
            self.vllm_config,
            num_tokens=num_rows,
            slot_mapping=slot_mappings or {},
        ):
            return self.model(
                self.input_ids[:num_rows],
                self.positions[:num_rows],
                self.hidden_states[:num_rows],
            )

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
        with set_forward_context(
            layers,
            self.vllm_config,
            num_tokens=len(rows.positions),
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            return self.model(
                self._to_device(rows.next_tokens),
                self._to_device(rows.positions),
                rows.hidden,
            )

    def measure_cost(self, pass_rows: Callable[[int], Any]) -> StepCost | None:
        """Measure what steps cost, for adaptive trees; None where they are not.

        ``pass_rows`` runs the target over so many rows, output head included.
        """
        rows = [n for n in _MEASURED_ROWS if n < self.max_num_tokens]
        if self.options.has_fixed_shape or not self.options.adaptive or not rows:
            return None
        few, many = self.hidden_states[:1], self.hidden_states[:_MEASURED_REQUESTS]
        parts = [functools.partial(pass_rows, n) for n in rows]
        parts += [functools.partial(self._pass_rows, n) for n in (1, len(many))]
        parts += [functools.partial(self._grow, hidden) for hidden in (few, many)]
        *passes, one, several, grow_one, grow_many = median_seconds(parts, rounds=5)
        # Once, because it takes long; it only tells what many rows of prompts cost.
        rows.append(self.max_num_tokens)
        passes += median_seconds(
            [functools.partial(pass_rows, self.max_num_tokens)], rounds=1
        )
        per_row = max(several - one, 0.0) / max(len(many) - 1, 1)
        levels, nodes = self._grow(few)
        _, more = self._grow(many)
        per_node = max(grow_many - grow_one, 0.0) / max(more - nodes, 1)
        per_level = max(grow_one - nodes * per_node, 0.0) / levels
        measured = [*passes, one - per_row, per_row, per_level, per_node]
        seconds = torch.tensor(measured, dtype=torch.float64, device=self.device)
        *passes, once, per_row, per_level, per_node = (
            get_tp_group().broadcast(seconds).tolist()
        )
        logger.info(
            "clover2: a pass takes %s; drafting %.1f ms for one request",
            ", ".join(
                f"{1e3 * passed:.1f} ms over {n} row{'s'[: n > 1]}"
                for n, passed in zip(rows, passes, strict=True)
            ),
            1e3 * (one + grow_one),
        )
        return StepCost(
            rows,
            passes,
            (max(once, 0.0), per_row),
            (per_level, per_node),
            self.max_num_tokens,
        )

    def measure_parts(self, pass_rows: Callable[[int], Any]) -> dict[str, float]:
        """Seconds of the parts of one request's step, the names ending in their rows.

        A dynamic tree is grown to its full depth, which is the most that it can take.
        Attention has no KV to read here, in the target and in the draft.
        """
        rows = min(self.options.num_nodes + 1, self.max_num_tokens)
        parts: dict[str, Callable[[], Any]] = {
            "target_1": functools.partial(pass_rows, 1),
            f"target_{rows}": functools.partial(pass_rows, rows),
            f"augment_{_COMMITTED_ROWS}": functools.partial(
                self._pass_rows, _COMMITTED_ROWS
            ),
            "grow": functools.partial(self._grow, self.hidden_states[:1]),
        }
        seconds = median_seconds(list(parts.values()), rounds=9)
        return dict(zip(parts, seconds, strict=True))

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

    def of_first_rank(self, trees: GrownTrees) -> GrownTrees:
        """The trees of tensor-parallel rank 0.

        The scheduler tells every rank the drafted tokens but not their parents, and
        the last bit of an all-reduce may differ between ranks; a tie broken
        differently would give them different trees.
        """
        group = get_tp_group()
        if group.world_size == 1:
            return trees
        return GrownTrees(*(group.broadcast(part.contiguous()) for part in trees))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        """Host array -> device; no copy on CPU, asynchronous on CUDA."""
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def median_seconds(parts: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Median times of some parts, which wait for the device.

    They take turns, because a moment in which the machine is busy must not meet one of
    them alone: what counts is how they compare. A first round is not counted.
    """
    times = []
    for _ in range(rounds + 1):
        row = []
        for run in parts:
            start = time.perf_counter()
            run()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            row.append(time.perf_counter() - start)
        times.append(row)
    return [median(column) for column in zip(*times[1:], strict=True)]
