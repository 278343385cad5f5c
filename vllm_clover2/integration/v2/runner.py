# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with Clover-2. No stock method is copied."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.async_utils import AsyncOutput
from vllm.v1.worker.gpu.model_runner import ExecuteModelState

from vllm_clover2 import ops
from vllm_clover2.integration import layer_limits, scheduling
from vllm_clover2.integration.compat import surface
from vllm_clover2.integration.v2.cost import DeviceDrafter
from vllm_clover2.integration.v2.model_state import Clover2ModelState
from vllm_clover2.integration.v2.speculator import make_speculator
from vllm_clover2.integration.v2.widths import AdaptiveWidths

logger = init_logger(f"vllm.{__name__}")


class Clover2ModelRunner(model_runner.GPUModelRunner):
    """Model Runner V2 with our speculator and model state, which brings our sampler."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        surface.check_signatures(surface.EXPECTED_WORKER_V2)
        with _made_by("init_speculator", make_speculator):
            super().__init__(vllm_config, device)
        # A head reads the target's hidden state before its final norm, which vLLM hands
        # out the way EAGLE-3 asks for intermediate layers.
        self.use_aux_hidden_state_outputs = vllm_config.speculative_config.has_head
        self.widths: AdaptiveWidths | None = None  # None: as the scheduler has them

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        make_state = partial(Clover2ModelState, self.speculator)
        with _made_by("init_model_state", make_state):
            super().load_model(*args, **kwargs)
        if self.speculator.drafting.branches:
            layer_limits.refuse_unsuitable_layers(
                self.model_state.target_layers, self.device.type
            )
        options = self.speculator.drafting.options
        logger.info("clover2: %s, ops run %s", options, ops.backend(self.device.type))

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        if self.speculator.drafting.branches:
            layer_limits.refuse_several_kv_groups(kv_cache_config)
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)

    @torch.inference_mode()
    def measure_cost(self) -> None:
        """Measure what steps cost, for adaptive trees; call once, after warm-up."""
        speculative = self.vllm_config.speculative_config
        if not speculative.adapts_on_v2:
            return
        if (cost := self._drafter().measure_cost(self._pass_rows)) is not None:
            trees = self.speculator.drafting.trees
            self.widths = AdaptiveWidths(cost, trees, speculative.has_head)

    @torch.inference_mode()
    def measure_parts(self) -> dict[str, float]:
        """Seconds of the parts of one request's step, measured now."""
        return self._drafter().measure_parts(self._pass_rows)

    def _drafter(self) -> DeviceDrafter:
        return DeviceDrafter(self.speculator, self.vllm_config, self.device)

    def _pass_rows(self, num_rows: int) -> None:
        """Run the target over so many rows, output head included, as in a step."""
        speculator, self.speculator = self.speculator, None  # it would draft as well
        try:
            hidden_states, _ = self._dummy_run(num_rows)
        finally:
            self.speculator = speculator
        self.model.compute_logits(hidden_states[:num_rows])

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        if self.widths is not None:
            self.widths.begin()
        return super().execute_model(*args, **kwargs)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        state = self.execute_model_state
        output = super().sample_tokens(grammar_output)
        if self.widths is not None and state is not None:
            self._choose_width(self.widths, state, output)
        return output

    def _choose_width(
        self, widths: AdaptiveWidths, state: ExecuteModelState, output: AsyncOutput
    ) -> None:
        """Tell the scheduler how many nodes to verify of every request."""
        width = widths.end(
            state.input_batch,
            output.num_sampled_tokens,
            grown=state.num_spec_tokens_to_schedule > 0,
        )
        scheduling.attach(output.model_runner_output, width)

    def step_milliseconds(self) -> dict[int, float]:
        """See ``Clover2WorkerMixin.clover2_step_milliseconds``."""
        return {} if self.widths is None else self.widths.chooser.cost.milliseconds()

    def counts(self) -> dict[str, int]:
        """Nodes verified and accepted; waits for the device."""
        verified, accepted = self.speculator.drafting.trees.counts.tolist()
        return {"verified": verified, "accepted": accepted}


@contextlib.contextmanager
def _made_by(name: str, make: Any) -> Iterator[None]:
    """Have the stock runner make one of its parts by ``make``.

    ``vllm.v1.worker.gpu.model_runner`` chooses them by functions of these names, which
    know no plugins (vLLM RFC 36219 would change that).
    """
    stock = getattr(model_runner, name)
    setattr(model_runner, name, make)
    try:
        yield
    finally:
        setattr(model_runner, name, stock)
