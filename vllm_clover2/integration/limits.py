# SPDX-License-Identifier: Apache-2.0
"""Engine configurations that Clover-2 cannot serve yet, each with its reason.

What only the loaded target shows is in ``layer_limits``.
"""

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from vllm_clover2.integration.compat import DOCTOR_HINT


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Raise for a configuration that would give wrong text or crash later.

    Raises:
        ValueError: one line per feature: what it is, why not, what to do instead.

    """
    reasons = _method_limits(vllm_config)
    if vllm_config.speculative_config.tree_options().tree != "chain":
        reasons += _tree_limits(vllm_config)
    if vllm_config.use_v2_model_runner:
        reasons += _runner_v2_limits(vllm_config)
    if vllm_config.use_v2_model_runner != vllm_config.speculative_config.runs_on_v2:
        reasons.append(
            "what makes vLLM itself take the other model runner (its log names it); "
            "remove it, or set VLLM_USE_V2_MODEL_RUNNER to 1 or 0"
        )
    refuse(reasons)


def refuse(reasons: list[str]) -> None:
    """Raise ``ValueError`` if there are any."""
    if reasons:
        raise ValueError(
            "The speculative method 'clover2' does not support this configuration:\n"
            + "\n".join([*(f"- {reason}" for reason in reasons), DOCTOR_HINT])
        )


def _method_limits(vllm_config: VllmConfig) -> list[str]:
    """What neither a tree nor a chain of drafts can be combined with."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    limits = {
        "pipeline parallelism: on Model Runner V1 any speculation of vLLM fails on all "
        "stages but the last, which alone has a drafter; on V2 the others never learn "
        "trees and accepted rows; set pipeline_parallel_size=1": (
            parallel.pipeline_parallel_size > 1
        ),
        "context parallelism: it interleaves KV slots over ranks; set "
        "decode_context_parallel_size=1 and prefill_context_parallel_size=1": (
            parallel.decode_context_parallel_size > 1
            or parallel.prefill_context_parallel_size > 1
        ),
        "KV transfer: blocks would be shipped before the accepted rows are moved to "
        "their final slots; remove kv_transfer_config": (
            vllm_config.kv_transfer_config is not None
        ),
        "micro-batching: attention metadata is built per micro-batch; disable dbo": (
            parallel.use_ubatching
        ),
        "M-RoPE targets: their positions have three components; use a text model": (
            model.uses_mrope
        ),
        "hybrid or attention-free targets: recurrent state cannot branch; use a "
        "transformer": model.is_hybrid or model.is_attention_free,
        "MLA targets: their KV layout is not supported; use an MHA/GQA target": (
            model.use_mla
        ),
        "CUDA graphs of whole passes on Model Runner V1: there rows and masks of "
        'drafts are made anew in every step; set cudagraph_mode "PIECEWISE" in '
        "compilation_config": (
            not vllm_config.use_v2_model_runner
            and graphs is not None
            and graphs.has_full_cudagraphs()
            and not graphs.requires_piecewise_compilation()
        ),
    }
    return [reason for reason, found in limits.items() if found]


def _tree_limits(vllm_config: VllmConfig) -> list[str]:
    """What a chain can be combined with but a tree cannot."""
    limits = {
        "quantized KV cache with trees: tree attention reads 16 and 32 bit KV; use "
        'kv_cache_dtype="auto", or "tree": "chain"': is_quantized_kv_cache(
            vllm_config.cache_config.cache_dtype
        ),
        "sliding-window attention with trees on CUDA or Model Runner V2: no GPU has "
        'shown that blocks outside the window are not read; use "tree": "chain"': (
            vllm_config.model_config.get_sliding_window() is not None
            and (vllm_config.use_v2_model_runner or not current_platform.is_cpu())
        ),
    }
    return [reason for reason, found in limits.items() if found]


def _runner_v2_limits(vllm_config: VllmConfig) -> list[str]:
    """What Model Runner V2 cannot be combined with; part of it V1 can."""
    speculative = vllm_config.speculative_config
    limits = {
        "batch-sharded sampling: each rank would know the accepted rows of its own "
        "requests only; remove enable_batch_sharded_sampling": (
            vllm_config.parallel_config.enable_batch_sharded_sampling
        ),
        "sampling masks on Model Runner V2: they would be those of other rows; remove "
        "return_sampling_mask": vllm_config.model_config.return_sampling_mask,
        "adaptive verification: it chooses by another drafter's confidences; remove "
        "enable_adaptive_verification": speculative.enable_adaptive_verification,
        "drafts that are sampled: clover2's trees are not; remove draft_sample_method "
        "and rejection_sample_method": (
            speculative.draft_sample_method != "greedy"
            or speculative.rejection_sample_method != "standard"
        ),
    }
    return [
        *(
            f"{part} on Model Runner V2; unset VLLM_USE_V2_MODEL_RUNNER"
            for part in speculative.missing_on_v2()
        ),
        *(reason for reason, found in limits.items() if found),
    ]
