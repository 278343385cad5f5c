# SPDX-License-Identifier: Apache-2.0
"""Arguments of an engine that are decided before its configuration is made."""

from pathlib import Path
from typing import Any

import torch
from vllm import envs
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_clover2.heads import NO_HEAD, local_folder
from vllm_clover2.integration.speculative_config import (
    Clover2SpeculativeConfig,
    head_for,
)
from vllm_clover2.model.head_files import check_head

logger = init_logger(f"vllm.{__name__}")


def refuse_async_scheduling(args: Any, speculative: Clover2SpeculativeConfig) -> None:
    """Raise if asynchronous scheduling was asked for on Model Runner V1.

    Raises:
        ValueError: says why and what to do.

    """
    if args.async_scheduling and not speculative.runs_on_v2:
        raise ValueError(
            "clover2 does not support asynchronous scheduling on Model Runner V1: the "
            "rows of a step follow from what the step before accepted. Leave "
            "async_scheduling unset, pass --no-async-scheduling, or on a GPU set "
            "VLLM_USE_V2_MODEL_RUNNER=1."
        )


def choose_head(args: Any, target: ModelConfig) -> None:
    """Name the target's head where the user named none, and check the head's files.

    This is before any process starts, so that what is wrong with them reaches the
    caller. A head on the hub is downloaded, to where vLLM looks for it. What is neither
    in a folder nor there (ModelScope, object storage) is checked as it is loaded.

    Raises:
        ValueError: there is no head, or its files are damaged.

    """
    options = args.speculative_config or {}
    head = args.spec_model or options.get("model")
    if head is None:
        head = head_for(target)
        args.speculative_config = options | {"model": head}
    elsewhere = envs.VLLM_USE_MODELSCOPE and not Path(head).is_dir()
    if head != NO_HEAD and "://" not in head and not elsewhere:
        check_head(local_folder(head, options.get("revision"), args.download_dir))


def choose_attention_backend(
    args: Any, target: ModelConfig, speculative: Clover2SpeculativeConfig
) -> None:
    """Set FLASH_ATTN where vLLM's own choice would be a backend that knows no trees.

    On compute capability 10.x vLLM prefers FlashInfer. The user's choice is kept, and
    float32, which neither of the two computes, is left to vLLM. The draft, for which
    vLLM chooses separately, gets the same unless the user chose for it.
    """
    chosen = args.attention_backend or args.attention_config.backend
    if (
        chosen in (None, "auto")
        and speculative.tree_options().tree != "chain"
        and current_platform.is_cuda()
        and current_platform.is_device_capability_family(100)
        and target.dtype in (torch.float16, torch.bfloat16)
    ):
        logger.info("clover2: attention by FLASH_ATTN, which knows trees")
        args.attention_backend = AttentionBackendEnum.FLASH_ATTN
        if speculative.attention_backend is None:
            speculative.attention_backend = AttentionBackendEnum.FLASH_ATTN
