# SPDX-License-Identifier: Apache-2.0
"""Runs the draft: the augmenting block over committed rows, then tree growth."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from vllm_clover2.tree.budget import (
    least_worth_verifying,
    sizes_worth_verifying,
    step_seconds,
)
from vllm_clover2.tree.growth import DynamicTree, grow_dynamic, grow_static
from vllm_clover2.tree.shapes import TreeShape
from vllm_clover2.tree.types import GrownTrees

_MIN_EXPANDED = 0.01
_MIN_LEVEL_MASS = 0.1
"""A level takes about 0.5 ms of a 20 ms step of SmolLM2-135M on two cores, and 0.04 ms
more for each node of it that gets children. Half of these nodes are accepted with a
child; those that hold less probability, alone or together, do not pay."""

_COMMITTED_ROWS = 3
"""A step commits its root and the accepted nodes: two or three rows."""

logger = init_logger(f"vllm.{__name__}")


@dataclass(frozen=True)
class CommittedRows:
    """Rows of the last target pass that are part of the text now, by request.

    A request's rows are consecutive positions: the scheduled prompt rows or its root,
    then the accepted nodes in path order.
    """

    rows: np.ndarray  # [n] int64 index into the pass's hidden states
    requests: np.ndarray  # [n] int64 batch index of each row's request
    positions: np.ndarray  # [n] int64, also the KV position
    counts: np.ndarray  # [num_reqs] int32 rows of each request, at least 1
    next_tokens: np.ndarray  # [n] int64 token that follows each row


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
        self._shape: TreeShape | DynamicTree
        if self.options.has_fixed_shape:
            self._shape = self.options.static_shape()
        else:
            self._shape = self.options.dynamic_tree()
            on_cpu = device.type == "cpu" and get_tp_group().world_size == 1
            if self.options.adaptive and on_cpu:
                # Free to look at, and ranks cannot disagree.
                self._shape = dataclasses.replace(
                    self._shape,
                    min_expanded=_MIN_EXPANDED,
                    min_level_mass=_MIN_LEVEL_MASS,
                )
        self.step_seconds: torch.Tensor | None = None  # by rows, see measure_step
        self._least_probability: list[float] = []  # by requests, with step_seconds

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
        self.grow(hidden[: self.max_batch_size])

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
        hidden_states: torch.Tensor,  # [rows of the pass, hidden]
        step: CommonAttentionMetadata,
        block_size: int,
    ) -> torch.Tensor:
        """Append the draft's KV of the committed rows.

        ``block_size`` is the number of tokens in one entry of the step's block table.
        Returns "g" of the last committed row of every request, [num_reqs, hidden].

        """
        to_device = self._to_device
        metadata = self._attention_metadata(committed, step, block_size)
        layers = {
            name: group_metadata
            for group, group_metadata in metadata
            for name in group.layer_names
        }
        slots = metadata[0][1].slot_mapping
        with set_forward_context(
            layers,
            self.vllm_config,
            num_tokens=len(committed.rows),
            slot_mapping=dict.fromkeys(self._draft_attn_layer_names, slots),
        ):
            augmented = self.model(
                to_device(committed.next_tokens),
                to_device(committed.positions),
                hidden_states[to_device(committed.rows)],
            )
        return augmented[to_device(np.cumsum(committed.counts) - 1)]

    def grow(self, hidden: torch.Tensor) -> GrownTrees:
        """Trees below the roots whose augmented states are ``hidden`` [n, hidden]."""
        if isinstance(self._shape, TreeShape):
            trees = grow_static(self.model, hidden, self._shape)
        elif self.step_seconds is None:
            trees = grow_dynamic(self.model, hidden, self._shape)
        else:
            least = self._least_probability[len(hidden)]
            if least > 1.0:  # not even a certain node would pay
                return GrownTrees.empty(len(hidden), hidden.device)
            tree = self._shape.without_nodes_below(least)
            trees = grow_dynamic(self.model, hidden, tree)
            sizes = sizes_worth_verifying(trees, self.step_seconds)
            trees = trees._replace(sizes=sizes)
        return _of_first_rank(trees)

    def measure_step(self, pass_rows: Callable[[int], Any]) -> None:
        """Measure what a step costs by its rows, for adaptive trees.

        ``pass_rows`` runs the target over so many rows, output head included.
        """
        if self.options.has_fixed_shape or not self.options.adaptive:
            return
        rows = [n for n in (1, 4, 16, 64, 256) if n <= self.max_num_tokens]
        if len(rows) < 2:
            return
        parts = [functools.partial(pass_rows, n) for n in rows]
        parts.append(functools.partial(self.grow, self.hidden_states[:1]))
        *target, draft = median_seconds(parts, rounds=5)
        seconds = torch.tensor([draft + passed for passed in target])
        seconds = get_tp_group().broadcast(seconds.to(self.device))
        table = step_seconds(rows, seconds.tolist(), self.max_num_tokens)
        self.size_trees_by(table)
        logger.info(
            "clover2: a step takes %s",
            ", ".join(
                f"{1e3 * float(table[n]):.1f} ms over {n} row{'s'[: n > 1]}"
                for n in rows
            ),
        )

    def size_trees_by(self, seconds: torch.Tensor) -> None:
        """Let trees be adaptive; ``seconds`` [max_num_tokens + 1] is a step's time."""
        self.step_seconds = seconds.to(self.device)
        self._least_probability = least_worth_verifying(seconds, self.max_batch_size)

    def measure_parts(self, pass_rows: Callable[[int], Any]) -> dict[str, float]:
        """Seconds of the parts of one request's step, the names ending in their rows.

        A dynamic tree is grown to its full depth, which is the most that it can take.
        Attention has no KV to read here, in the target and in the draft.
        """
        hidden = self.hidden_states[:1]
        if isinstance(self._shape, TreeShape):
            grow = functools.partial(self.grow, hidden)
        else:
            tree = self.options.dynamic_tree()
            grow = functools.partial(grow_dynamic, self.model, hidden, tree)
        rows = min(self.options.num_nodes + 1, self.max_num_tokens)
        parts: dict[str, Callable[[], Any]] = {
            "target_1": functools.partial(pass_rows, 1),
            f"target_{rows}": functools.partial(pass_rows, rows),
            f"augment_{_COMMITTED_ROWS}": functools.partial(
                self._pass_rows, _COMMITTED_ROWS
            ),
            "grow": grow,
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
        draft_step = CommonAttentionMetadata(
            query_start_loc=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=self._to_device(lengths),
            seq_lens_cpu_upper_bound=torch.from_numpy(lengths),
            num_reqs=num_reqs,
            num_actual_tokens=len(committed.rows),
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=step.block_table_tensor[:num_reqs],
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


def _of_first_rank(trees: GrownTrees) -> GrownTrees:
    """The trees of tensor-parallel rank 0.

    The scheduler tells every rank the drafted tokens but not their parents, and the
    last bit of an all-reduce may differ between ranks; a tie broken differently would
    give them different trees.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return trees
    return GrownTrees(*(group.broadcast(part.contiguous()) for part in trees))


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
