# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU worker with our model runner.

Import it only inside a CPU worker process: ``vllm.v1.worker.cpu_worker`` replaces
parts of ``torch.cuda`` when it is imported.
"""

from typing import Any

from vllm.v1.worker import cpu_worker

from vllm_clover2.integration.attention import register_tree_backends
from vllm_clover2.integration.compat import patches
from vllm_clover2.integration.runner import Clover2RunnerMixin
from vllm_clover2.integration.worker import Clover2WorkerMixin


class Clover2CPUModelRunner(Clover2RunnerMixin, cpu_worker.CPUModelRunner):
    """Model Runner V1 with Clover-2."""


class Clover2CPUWorker(Clover2WorkerMixin, cpu_worker.CPUWorker):
    """``CPUWorker`` that builds our model runner."""

    def init_device(self) -> None:
        """As the stock method, which has no hook for the runner's class."""
        register_tree_backends()
        stock = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = Clover2CPUModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = stock

    def load_model(self, **options: Any) -> None:
        with patches.packed_cpu_linears():
            super().load_model(**options)
