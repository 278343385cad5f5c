# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA worker with our model runner (Model Runner V1)."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_clover2.integration.attention import register_tree_backends
from vllm_clover2.integration.runner import Clover2RunnerMixin, Clover2WorkerMixin


class Clover2GPUModelRunner(Clover2RunnerMixin, GPUModelRunner):
    """Model Runner V1 with Clover-2."""


class Clover2GPUWorker(Clover2WorkerMixin, Worker):
    """``Worker`` that builds our model runner."""

    def _make_model_runner(self) -> GPUModelRunner:
        register_tree_backends()
        return Clover2GPUModelRunner(self.vllm_config, self.device)
