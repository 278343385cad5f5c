# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA worker with our model runner (Model Runner V1)."""

from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_clover2.integration.attention import register_tree_backends
from vllm_clover2.integration.runner import Clover2RunnerMixin


class Clover2GPUModelRunner(Clover2RunnerMixin, GPUModelRunner):
    pass


class Clover2GPUWorker(Worker):
    def _make_model_runner(self) -> GPUModelRunner:
        register_tree_backends()
        return Clover2GPUModelRunner(self.vllm_config, self.device)

    def clover2_stats(self) -> dict[str, int]:
        """See ``Clover2RunnerMixin``; for ``LLM.collective_rpc("clover2_stats")``."""
        return self.model_runner.clover2_stats()
