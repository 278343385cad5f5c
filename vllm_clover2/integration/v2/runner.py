# SPDX-License-Identifier: Apache-2.0
"""Model Runner V2 with Clover-2. No stock method is copied."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu import model_runner

from vllm_clover2 import ops
from vllm_clover2.integration import layer_limits
from vllm_clover2.integration.compat import surface
from vllm_clover2.integration.v2.model_state import Clover2ModelState
from vllm_clover2.integration.v2.speculator import make_speculator

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

    def measure_cost(self) -> None:
        """Trees have the same size in every step, whatever it costs."""

    def step_milliseconds(self) -> dict[int, float]:
        """No cost is known."""
        return {}

    def measure_parts(self) -> dict[str, float]:
        """No part can be measured alone.

        Raises:
            NotImplementedError: always.

        """
        raise NotImplementedError(
            "clover2 measures the parts of a step on Model Runner V1 only; set "
            "VLLM_USE_V2_MODEL_RUNNER=0."
        )

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
