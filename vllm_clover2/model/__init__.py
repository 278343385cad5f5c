# SPDX-License-Identifier: Apache-2.0
"""Drafts: configurations, plain-PyTorch models and weight formats."""

from vllm_clover2.model.clover2 import Clover2Model
from vllm_clover2.model.config import Clover2Config
from vllm_clover2.model.eagle1 import Eagle1Config, Eagle1Model
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
    "Eagle1Config",
    "Eagle1Model",
    "Packing",
    "RMSNorm",
    "RecurrentHead",
    "RegressiveAttentionBlock",
]
