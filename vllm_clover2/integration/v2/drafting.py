# SPDX-License-Identifier: Apache-2.0
"""What is drafted at the end of a step, with a head and without one, on the device."""

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.penalties import use_penalty
from vllm.v1.worker.gpu.states import RequestState

from vllm_clover2.integration.step import of_first_rank
from vllm_clover2.integration.v2.context import DeviceContext
from vllm_clover2.integration.v2.trees import DeviceTrees
from vllm_clover2.tree.grower import TreeGrower
from vllm_clover2.tree.growth import Draft

logger = init_logger(f"vllm.{__name__}")


class DeviceDrafting:
    """Grows trees for all requests of a batch, always as large as the options say."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        self.options = vllm_config.speculative_config.tree_options()
        if self.options.adaptive and not self.options.has_fixed_shape:
            logger.info(
                "clover2: trees have %d nodes in every step, whatever that costs: "
                "adaptive trees need Model Runner V1",
                self.options.num_nodes,
            )
        self.trees = DeviceTrees(
            req_states.max_num_reqs,
            self.options.num_nodes,
            self.options.max_depth,
            device,
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
    ) -> torch.Tensor:  # [R, nodes] int64
        """Grow and keep a tree for every request; returns the tokens."""
        slots, context, chains = batch.idx_mapping, None, None
        if self._context is not None:
            context = self._context.candidates(slots, num_sampled)
        growth = self._grower.grow(head, states, context)
        if self._context is not None:
            self._context.remember(slots, growth.walk)
        if self._chains.np[batch.idx_mapping_np].any():
            chains = self._chains.gpu[slots] > 0
        return self.trees.put(slots, of_first_rank(growth.trees), chains)

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
