# SPDX-License-Identifier: Apache-2.0
"""The callables of vLLM that we wrap or override, with their parameters.

:func:`check_signatures` compares them before a model is loaded, and only when
``clover2`` was asked for, so a vLLM that moved on is refused in one paragraph instead
of failing in the middle of a step. They are the same in every release of
:data:`~vllm_clover2.integration.compat.SUPPORTED_VLLM`; where releases differ one day,
the parameters become a tuple of alternatives here. Everything else that we read of vLLM
is compared with the sources of all supported releases by
``tests/integration/test_vllm_surface.py``.
"""

import functools
import importlib
import inspect

from vllm_clover2.integration.compat import install_hint

EXPECTED_CONFIG = {
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": (
        "self target_model_config target_parallel_config"
    ),
    "vllm.engine.arg_utils:EngineArgs.create_engine_config": (
        "self usage_context headless"
    ),
    "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser",
    "vllm.config.vllm:VllmConfig._get_v2_model_runner_unsupported_features": "self",
    "vllm.config.speculative:SpeculativeConfig.use_eagle": "self",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        "self scheduler_output model_runner_output"
    ),
    "vllm.v1.spec_decode.metrics:SpecDecodingLogging.observe": (
        "self spec_decoding_stats"
    ),
    "vllm.v1.spec_decode.metrics:SpecDecodingProm.__init__": (
        "self speculative_config labelnames per_engine_labelvalues is_diffusion"
    ),
    "vllm.v1.spec_decode.metrics:SpecDecodingProm.observe": (
        "self spec_decoding_stats engine_idx"
    ),
    "vllm.sampling_params:SamplingParams._validate_spec_decode": (
        "self speculative_config"
    ),
}
"""Used in the processes that read the configuration, schedule and serve."""

EXPECTED_WORKER = {
    "vllm.v1.worker.gpu_model_runner:build_logitsprocs": (
        "vllm_config device is_pin_memory is_pooling_model custom_logitsprocs"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": (
        "self scheduler_output num_scheduled_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.sample_tokens": (
        "self grammar_output"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._sample": (
        "self logits spec_decode_metadata"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": (
        "self scheduler_output sampler_output logits hidden_states num_scheduled_tokens"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.propose_draft_token_ids": (
        "self scheduler_output sampled_token_ids sampling_metadata hidden_states "
        "sample_hidden_states aux_hidden_states spec_decode_metadata "
        "common_attn_metadata slot_mappings"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._input_fits_in_drafter": (
        "self common_attn_metadata"
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._on_request_state_removed": (
        "self req_id req_state"
    ),
    "vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm": (
        "layer remove_weight"
    ),
    "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer": "vllm_config",
    "vllm.v1.spec_decode.eagle:EagleProposer.__init__": (
        "self vllm_config device runner"
    ),
    "vllm.v1.spec_decode.eagle:EagleProposer.dummy_run": (
        "self num_tokens use_cudagraphs is_graph_capturing slot_mappings"
    ),
}
"""Used in a worker; importing these elsewhere would be costly or have side effects."""

_V2 = "vllm.v1.worker.gpu"
EXPECTED_WORKER_V2 = {
    f"{_V2}.model_runner:init_speculator": "vllm_config device req_states",
    f"{_V2}.model_runner:init_model_state": "vllm_config model encoder_cache device",
    f"{_V2}.model_runner:GPUModelRunner.sample_tokens": "self grammar_output",
    f"{_V2}.model_runner:GPUModelRunner._dummy_run": (
        "self num_tokens args skip_attn uniform_decode context_len skip_eplb "
        "is_profile valid_dummy_state_slots randomize_inputs kwargs"
    ),
    f"{_V2}.model_states.default:DefaultModelState.add_request": (
        "self req_index new_req_data"
    ),
    f"{_V2}.model_states.default:DefaultModelState.prepare_inputs": (
        "self input_batch req_states"
    ),
    f"{_V2}.model_states.default:DefaultModelState.prepare_dummy_inputs": (
        "self num_reqs num_tokens"
    ),
    f"{_V2}.model_states.default:DefaultModelState.prepare_attn": (
        "self input_batch cudagraph_mode block_tables slot_mappings attn_groups "
        "kv_cache_config for_capture ubatch_idx model_specific_attn_metadata"
    ),
    f"{_V2}.model_states.default:DefaultModelState.postprocess_state": (
        "self idx_mapping num_sampled num_computed_tokens"
    ),
    f"{_V2}.model_states.default:DefaultModelState.initialize_kv_cache": (
        "self kv_cache_config block_tables"
    ),
    f"{_V2}.spec_decode.rejection_sampler:RejectionSampler._verify": (
        "self logits draft_logits draft_sampled pos cu_num_logits idx_mapping "
        "idx_mapping_np expanded_idx_mapping expanded_local_pos "
        "seq_lens_upper_bound_np verify_draft_sampled"
    ),
    f"{_V2}.spec_decode.rejection_sampler:RejectionSampler._get_logprobs_tensors": (
        "self sampled num_sampled logits cu_num_logits cu_num_logits_np "
        "max_num_logprobs"
    ),
    f"{_V2}.sample.sampler:Sampler.apply_sampling_params": (
        "self logits expanded_idx_mapping idx_mapping idx_mapping_np pos input_ids "
        "expanded_local_pos seq_lens_upper_bound_np skip_top_k_top_p"
    ),
    f"{_V2}.block_table:BlockTables.compute_slot_mappings": (
        "self idx_mapping query_start_loc positions num_tokens_padded out"
    ),
    f"{_V2}.cudagraph_utils:CudaGraphManager.__init__": (
        "self vllm_config device cudagraph_mode decode_query_len lora_capture_cases "
        "varlen_decode ubatch_runner"
    ),
    f"{_V2}.cudagraph_utils:CudaGraphManager.capture": (
        "self create_forward_fn progress_bar_desc"
    ),
    f"{_V2}.cudagraph_utils:CudaGraphManager.dispatch": (
        "self num_reqs num_tokens uniform_token_count num_active_loras max_query_len "
        "num_ubatches"
    ),
    f"{_V2}.cudagraph_utils:CudaGraphManager.run_fullgraph": "self desc",
    f"{_V2}.cudagraph_utils:prepare_inputs_to_capture": (
        "num_reqs num_tokens model_state input_buffers block_tables attn_groups "
        "kv_cache_config full_cudagraph max_query_len pcp_manager"
    ),
    f"{_V2}.spec_decode.speculator:DraftModelSpeculator._build_attn_metadata": (
        "self num_reqs batch_desc query_start_loc_np seq_lens_cpu_upper_bound step "
        "causal dcp_local_seq_lens slot_mappings"
    ),
}
"""The same for Model Runner V2."""


def check_signatures(expected: dict[str, str]) -> None:
    """Raise if a callable of vLLM no longer has the parameters we rely on.

    Raises:
        RuntimeError: one paragraph that names every mismatch and what to install.

    """
    problems = []
    for path, parameters in expected.items():
        module, _, attributes = path.partition(":")
        try:
            target = functools.reduce(
                getattr, attributes.split("."), importlib.import_module(module)
            )
            found = " ".join(inspect.signature(target).parameters)
        except (ImportError, AttributeError) as error:
            problems.append(f"{path} is missing ({error})")
            continue
        if found != parameters:
            problems.append(f"{path} takes ({found}), expected ({parameters})")
    if problems:
        import vllm

        raise RuntimeError(
            f"The speculative method 'clover2' needs internals of vLLM that differ in "
            f"the installed vLLM {vllm.__version__}: {'; '.join(problems)}. "
            f"{install_hint()}"
        )
