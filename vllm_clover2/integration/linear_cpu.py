# SPDX-License-Identifier: Apache-2.0
"""Linear layers in float32 by our product on CPUs that have AVX2 and not AVX-512.

A step that verifies trees has a few rows. vLLM's oneDNN takes 1.2 to 1.6 times as long
over two to six rows there as over one; ours, which reads the weights meanwhile, as long
as over one. Both sum in the same order, so all results are the same to the last bit.
"""

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_clover2 import ops

logger = init_logger(f"vllm.{__name__}")


def serves_packed() -> bool:
    """Whether float32 layers have our product on this machine."""
    return (
        current_platform.is_cpu()
        and not current_platform.is_zen_cpu()  # it has products of its own
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
        and ops.backend() == "native"
    )


def can_be_packed(weight: torch.Tensor) -> bool:
    """Whether it is that of a linear layer in float32."""
    return weight.dtype == torch.float32 and weight.ndim == 2 and not weight.is_meta


def pack_layer(layer: Any, remove_weight: bool) -> None:
    """What ``dispatch_cpu_unquantized_gemm`` does, with our product."""
    weight = layer.weight.detach()
    packed, outputs = ops.pack_linear(weight), weight.shape[0]

    def cpu_linear(
        x: torch.Tensor, _weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return ops.packed_linear(rows, packed, bias, outputs).view(
            *x.shape[:-1], outputs
        )

    layer.cpu_linear = cpu_linear
    if remove_weight:
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
    logger.info_once("clover2: float32 linear layers by our packed product")
