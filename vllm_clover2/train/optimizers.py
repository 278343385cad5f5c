# SPDX-License-Identifier: Apache-2.0
"""Optimisers of a run and their learning rate by step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vllm_clover2.train.clover2 import Gains
from vllm_clover2.train.config import TrainConfig

__all__ = ["lr_factor", "make_optimizers"]


def lr_factor(step: int, config: TrainConfig) -> float:
    """Warm-up, a plateau, and a cosine over the last `decay_fraction` of the run."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    start = max(config.warmup_steps, round(config.steps * (1 - config.decay_fraction)))
    progress = (step - start) / max(1, config.steps - start)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return config.final_lr_fraction + (1 - config.final_lr_fraction) * cosine


class _InFloat32(TorchFunctionMode):
    """Within it `Tensor.bfloat16` makes a copy in the same dtype."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            func = torch.Tensor.clone
        return func(*args, **(kwargs or {}))


class Float32Muon(torch.optim.Muon):
    """Muon that orthogonalises in float32, where PyTorch's always does in bfloat16.

    A CPU without bfloat16 instructions spends most of a training step there otherwise.
    """

    def step(self, closure: Any = None) -> Any:
        with _InFloat32():
            return super().step(closure)


def make_optimizers(
    model: nn.Module, gains: Gains | None, config: TrainConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the larger matrices and AdamW for the rest.

    The blocks' projections stay with AdamW: their useful scales differ by orders
    of magnitude, which Muon's equal-sized updates ignore.
    """
    muon: list[nn.Parameter] = []
    scales = {"": 1.0}
    if gains is not None:
        # An Adam step changes every entry by about the learning rate, whatever its
        # size; a matrix started `gain` times larger needs a rate as much larger.
        scales |= {
            "rab1.v_proj.weight": gains.rab1,
            "rab2.v_proj.weight": gains.rab2,
            "fusion.weight": gains.fusion,
        }
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in scales}
    for name, parameter in model.named_parameters():
        scaled = next((key for key in scales if key and name.endswith(key)), None)
        if scaled is not None:
            groups[scaled].append(parameter)
        elif config.muon_lr is not None and parameter.ndim == 2 and "rab" not in name:
            muon.append(parameter)
        else:
            groups[""].append(parameter)
    lr, decay = config.learning_rate, config.weight_decay
    adamw = torch.optim.AdamW(
        [
            {"params": groups[key], "lr": lr * scale, "weight_decay": decay / scale}
            for key, scale in scales.items()
            if groups[key]  # EAGLE-1 has no blocks
        ],
        betas=(0.9, config.beta2),
        fused=True,
    )
    if not muon:
        return [adamw]
    muon_class = torch.optim.Muon if config.precision == "bf16" else Float32Muon
    return [
        adamw,
        muon_class(
            muon,
            lr=config.muon_lr,
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        ),
    ]
