# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with our model runner.

Import it only inside a CPU worker process: ``vllm.v1.worker.cpu_worker`` replaces
parts of ``torch.cuda`` when it is imported.
"""

from vllm.v1.worker import cpu_worker

from vllm_clover2.integration.attention import register_tree_backends
from vllm_clover2.integration.runner import Clover2RunnerMixin


class Clover2CPUModelRunner(Clover2RunnerMixin, cpu_worker.CPUModelRunner):
    pass


class Clover2CPUWorker(cpu_worker.CPUWorker):
    def init_device(self) -> None:
        """As the stock method, which has no hook for the runner's class."""
        register_tree_backends()
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = Clover2CPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock

    def clover2_stats(self) -> dict[str, int]:
        """See ``Clover2RunnerMixin``; for ``LLM.collective_rpc("clover2_stats")``."""
        return self.model_runner.clover2_stats()
