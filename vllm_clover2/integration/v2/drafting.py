# SPDX-License-Identifier: Apache-2.0
"""What is drafted at the end of a step, with a head and without one, on the device."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.penalties import use_penalty
from vllm.v1.worker.gpu.states import RequestState

from vllm_clover2.integration.step import of_first_rank
from vllm_clover2.integration.v2.context import DeviceContext
from vllm_clover2.integration.v2.graphs import DraftingGraphs
from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.grower import TreeGrower
from vllm_clover2.tree.growth import Draft
from vllm_clover2.tree.types import GrownTrees


class _Inputs(NamedTuple):
    """What a graph reads, for R requests at most; those that pad have slot -1."""

    states: torch.Tensor  # [R, hidden]
    slots: torch.Tensor  # [R] int64
    num_sampled: torch.Tensor  # [R] int32

    def fill(self, *values: torch.Tensor) -> None:
        """Set the first requests, and the others to such as pad."""
        count = len(values[0])
        for buffer, value in zip(self, values, strict=True):
            buffer[:count] = value
        self.slots[count:] = -1
        self.num_sampled[count:] = 0


class DeviceDrafting:
    """Grows trees for all requests of a batch, as large as the options say.

    Of those of a step the scheduler takes equally many nodes, see ``widths``.
    """

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        speculative = vllm_config.speculative_config
        self.options = speculative.tree_options()
        self.trees = DeviceTrees(
            req_states.max_num_reqs,
            self.options.num_nodes,
            self.options.max_depth,
            device,
        )
        hidden_size = 0
        if speculative.has_head:
            hidden_size = speculative.draft_model_config.get_hidden_size()
        slots = req_states.max_num_reqs
        dtype = vllm_config.model_config.dtype
        self._inputs = _Inputs(
            torch.zeros(slots, hidden_size, dtype=dtype, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            torch.zeros(slots, dtype=torch.int32, device=device),
        )
        self.chains_for_all = False
        self._chains = UvaBackedTensor(req_states.max_num_reqs, dtype=torch.int32)
        self._grower = TreeGrower(self.options, device)
        limits = self.options.context_limits()
        self._context = limits and DeviceContext(
            limits, self._grower.calibration, req_states, device
        )

    @property
    def branches(self) -> bool:
        """Whether drafted rows may be anything but a chain."""
        return self.options.tree != "chain"

    def add_request(self, slot: int, params: SamplingParams | None) -> None:
        """A request got this slot."""
        chain = params is not None and reads_drafts_as_text(params)
        self._chains.np[slot] = chain or self.chains_for_all

    def apply_staged_writes(self) -> None:
        """Tell the device of new requests."""
        self._chains.copy_to_uva()

    def draft(
        self,
        head: Draft | None,  # None: the texts are the only source
        states: torch.Tensor,  # [R, hidden] of the head at the roots
        batch: InputBatch,
        num_sampled: torch.Tensor,  # [R] int32
        graphs: DraftingGraphs,
    ) -> torch.Tensor:  # [R, nodes] int64
        """Grow and keep a tree for every request; returns the tokens."""
        slots, count = batch.idx_mapping, batch.num_reqs
        size = graphs.size_for(count)
        if size is None:
            return self.keep(batch, self._grow(head, states, slots, num_sampled))
        self._inputs.fill(states, slots, num_sampled)
        trees, tokens = graphs.replay(size)
        trees = GrownTrees(*(part[:count] for part in trees))
        return self.keep(batch, trees, tokens[:count])

    def part_for(
        self, head: Draft | None, size: BatchExecutionDescriptor
    ) -> Callable[[], tuple[GrownTrees, torch.Tensor]]:
        """What a graph does: grow and keep trees for the requests in the buffers."""
        states, slots, num_sampled = self._nobody(size.num_reqs or 0)

        def part() -> tuple[GrownTrees, torch.Tensor]:
            trees = self._grow(head, states, slots, num_sampled)
            return trees, self.trees.put(slots, trees)

        return part

    def grow_for_nobody(
        self, head: Draft | None, requests: int, graphs: DraftingGraphs
    ) -> None:
        """What growing trees for so many requests does, to be timed."""
        nobody = self._nobody(requests)
        size = graphs.size_for(requests)
        if size is None:
            self._grow(head, *nobody)
        else:
            graphs.replay(size)

    def _nobody(self, requests: int) -> _Inputs:
        """Inputs of a graph, in which all requests only pad the batch."""
        self._inputs.fill(*(buffer[:0] for buffer in self._inputs))
        return _Inputs(*(buffer[:requests] for buffer in self._inputs))

    def keep(
        self,
        batch: InputBatch,
        trees: GrownTrees,  # of its requests
        kept: torch.Tensor | None = None,  # tokens, if the trees were kept as they are
    ) -> torch.Tensor:  # [R, nodes] int64
        """Keep the trees, or chains of them where drafts are read as text."""
        slots, chains = batch.idx_mapping, None
        if self._chains.np[batch.idx_mapping_np].any():
            chains = self._chains.gpu[slots] > 0
        agreed = of_first_rank(trees)
        if kept is not None and chains is None and agreed is trees:
            return kept
        return self.trees.put(slots, agreed, chains)

    def _grow(
        self,
        head: Draft | None,
        states: torch.Tensor,  # [R, hidden]
        slots: torch.Tensor,  # [R] int64
        num_sampled: torch.Tensor,  # [R] int32
    ) -> GrownTrees:
        if self._context is None:
            return self._grower.grow(head, states, None).trees
        context = self._context.candidates(slots, num_sampled)
        growth = self._grower.grow(head, states, context)
        self._context.remember(slots, growth.walk)
        return growth.trees

    def no_tokens(self, batch: InputBatch) -> torch.Tensor:  # [R, nodes] int64
        """In place of drafts where the scheduler plans to verify none."""
        shape = batch.num_reqs, self.options.num_nodes
        return batch.idx_mapping.new_zeros(shape)

    def dummy_draft(self, head: Draft | None, states: torch.Tensor) -> None:
        """Grow trees that nobody gets."""
        self._grower.grow(head, states, None)


def reads_drafts_as_text(params: SamplingParams) -> bool:
    """Whether vLLM takes the drafted rows before a row for the text before it.

    Such a request gets chains, of which that is true.
    """
    return bool(
        use_penalty(params)
        or params.bad_words
        or params.bad_words_token_ids
        or params.structured_outputs is not None
        or params.thinking_token_budget is not None
    )
