# SPDX-License-Identifier: Apache-2.0
"""Clover-2: configuration, plain-PyTorch model and weight formats."""

from vllm_clover2.model.clover2 import Clover2Model
from vllm_clover2.model.config import Clover2Config
from vllm_clover2.model.layers import (
    RecurrentHead,
    RegressiveAttentionBlock,
    RMSNorm,
)
from vllm_clover2.model.llama import DraftCache, Packing

__all__ = [
    "Clover2Config",
    "Clover2Model",
    "DraftCache",
    "Packing",
    "RMSNorm",
    "RecurrentHead",
    "RegressiveAttentionBlock",
]
