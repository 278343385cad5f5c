# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA worker with our model runners."""

from typing import Any

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_clover2.integration.attention import register_tree_backends
from vllm_clover2.integration.runner import Clover2RunnerMixin
from vllm_clover2.integration.worker import Clover2WorkerMixin


class Clover2GPUModelRunner(Clover2RunnerMixin, GPUModelRunner):
    """Model Runner V1 with Clover-2."""


class Clover2GPUWorker(Clover2WorkerMixin, Worker):
    """``Worker`` that builds our model runner."""

    def _make_model_runner(self) -> Any:
        register_tree_backends()
        if self.use_v2_model_runner:
            # Not at the top: its modules need Triton.
            from vllm_clover2.integration.v2.runner import Clover2ModelRunner

            return Clover2ModelRunner(self.vllm_config, self.device)
        return Clover2GPUModelRunner(self.vllm_config, self.device)
