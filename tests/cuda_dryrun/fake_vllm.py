# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM's CUDA code on the fake GPU, without its compiled libraries.

What these, NVML and Triton would do for a dense Llama on FLASH_ATTN is done in torch;
our own CUDA kernels run in their emulator. Everything else is vLLM's, unchanged.
"""

import functools
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fake_gpu
import fake_triton
import torch
from fake_gpu import MODE, inside_a_kernel, launch

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_BREAKABLE_CUDAGRAPH": "1",  # graphs without torch.compile
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # FlashInfer is not there
}
# Engine options that keep away from compiled libraries, and those that keep graphs.
ENGINE: dict[str, Any] = {
    "dtype": "float32",  # so that texts can be compared exactly
    "enforce_eager": True,
    "gpu_memory_utilization": 0.5,
    "compilation_config": {"mode": 0, "custom_ops": ["none"]},
    "kernel_config": {
        "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}
    },
}

GRAPHS = {
    "enforce_eager": False,
    # Without Triton there is nothing to compile ahead.
    "kernel_config": ENGINE["kernel_config"] | {"enable_jit_warmup": False},
    "compilation_config": {
        "mode": 0,
        "custom_ops": ["none"],
        "cudagraph_mode": "FULL_AND_PIECEWISE",  # as vLLM has it on a GPU
        # Batch sizes, and rows of 1 to 8 requests that draft below trees (17 rows
        # each), or verify them (26).
        "cudagraph_capture_sizes": [1, 2, 4, 8, 34, 52, 68, 104, 136, 208],
    },
}


def graphs_of(mode: str, *sizes: int) -> dict[str, Any]:
    """Options of an engine with other CUDA graphs than most here."""
    options = GRAPHS["compilation_config"] | {"cudagraph_mode": mode}
    if sizes:
        options["cudagraph_capture_sizes"] = list(sizes)
    return {"compilation_config": options}


def install(folder: Path) -> None:
    """Make ``import vllm`` give the CUDA build in ``folder``, on a fake GPU."""
    # vLLM remembers there what it found out about models, whatever its release.
    os.environ.update(ENVIRONMENT, VLLM_CACHE_ROOT=str(folder / "cache"))
    sys.path.insert(0, str(folder))
    fake_gpu.install()
    _register_operators_for_the_cpu()
    register_emulated_kernels()
    for name in ("_C_stable_libtorch", "vllm_flash_attn._vllm_fa3_C"):
        sys.modules[f"vllm.{name}"] = ModuleType(f"vllm.{name}")
    _fake_nvml()
    _replace_kernels()
    fake_triton.install()
    _define_missing_operators(folder)


def _register_operators_for_the_cpu() -> None:
    """Operators that vLLM writes in Python run for host tensors, and are looked into.

    The dispatcher would call them with our mode switched off.
    """
    stock = torch.library.Library.impl

    @functools.wraps(stock)
    def impl(
        self: Any, name: str, function: Any, dispatch_key: str = "", **kwargs: Any
    ) -> Any:
        if self.ns != "vllm" or dispatch_key != "CUDA":
            return stock(self, name, function, dispatch_key, **kwargs)

        @functools.wraps(function)
        def looked_into(*args: Any, **kwargs: Any) -> Any:
            with MODE:
                return function(*args, **kwargs)

        return stock(self, name, looked_into, "CPU", **kwargs)

    torch.library.Library.impl = impl


def register_emulated_kernels() -> None:
    """Our CUDA kernels; the mode sends them what is on the fake GPU."""
    import emulated_kernels

    from vllm_clover2.ops import REFERENCES, schema

    fake_gpu.emulator = emulated_kernels.load()
    emulated = getattr(torch.ops, emulated_kernels.NAMESPACE)
    library = torch.library.Library(schema.NAMESPACE, "IMPL")  # noqa: TOR901
    fake_gpu.emulator.implementations = library  # lives as long as the process
    for name in schema.SCHEMAS:
        operator = getattr(torch.ops.clover2, name).default
        if name in schema.WITHOUT_KERNEL["cuda"]:
            fake_gpu.looked_into[operator] = REFERENCES[name]
            continue
        kernel = getattr(emulated, name).default
        library.impl(name, kernel, "CUDA")
        fake_gpu.kernels[operator] = kernel


def _define_missing_operators(folder: Path) -> None:
    """Names that vLLM's Python looks up in its library, and never calls here."""
    library = torch.library.Library("_C", "FRAGMENT")  # noqa: TOR901
    fake_gpu.emulator.definitions_for_vllm = library
    names = {("silu_and_mul", "default")}
    for file in (folder / "vllm" / "compilation").rglob("*.py"):
        names |= {*re.findall(r"torch\.ops\._C\.(\w+)\.(\w+)", file.read_text())}
    for name, overload in names:
        library.define(f"{name}{'' if overload == 'default' else '.out'}() -> ()")


def _fake_nvml() -> None:
    import vllm.third_party.pynvml as nvml

    memory = SimpleNamespace(total=80 << 30, free=80 << 30, used=0)
    for name, answer in {
        "Init": None,
        "Shutdown": None,
        "DeviceGetCount": 1,
        "DeviceGetHandleByIndex": 0,
        "DeviceGetHandleByUUID": 0,
        "DeviceGetCudaComputeCapability": tuple(fake_gpu.CAPABILITY),
        "DeviceGetName": "NVIDIA H100",
        "DeviceGetUUID": "GPU-0",
        "DeviceGetMemoryInfo": memory,
    }.items():
        setattr(nvml, f"nvml{name}", lambda *_, answer=answer, **__: answer)

    from vllm.platforms import current_platform

    assert current_platform.is_cuda()
    type(current_platform).dist_backend = "gloo"


def _replace_kernels() -> None:
    """Kernels of Triton, FlashAttention and vLLM's library, in torch."""
    import vllm._custom_ops
    import vllm.utils.torch_utils
    import vllm.vllm_flash_attn

    vllm.utils.torch_utils.get_accelerator_view_from_cpu_tensor = fake_gpu.mapped
    vllm.utils.torch_utils.weak_ref_tensor = lambda value: value

    ops = vllm._custom_ops
    ops.reshape_and_cache_flash = _write_kv
    ops.apply_repetition_penalties_cuda = ops.apply_repetition_penalties_torch
    ops.cutlass_scaled_mm_supports_fp8 = lambda _: False
    ops.cutlass_scaled_mm_supports_block_fp8 = lambda _: False
    vllm.vllm_flash_attn.flash_attn_varlen_func = _flash_attention
    vllm.vllm_flash_attn.get_scheduler_metadata = _plan_attention

    from vllm.model_executor.models import registry
    from vllm.model_executor.warmup import kernel_warmup
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    from vllm.v1.sample.ops import topk_topp_sampler
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.worker import block_table

    FlashAttentionBackend.supported_dtypes = [torch.float32, torch.bfloat16]
    block_table._COMPUTE_SLOT_MAPPING_KERNEL = _SlotMapping()
    topk_topp_sampler.apply_top_k_top_p_triton = _top_k_top_p
    # Called in warm-up only: we have our own.
    RejectionSampler.forward = lambda *_, **__: None
    registry._run_in_subprocess = lambda inspect: inspect()  # a fake GPU has no child
    kernel_warmup.kernel_warmup = lambda *_, **__: None


def _on_gpu(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        if not fake_gpu.on_gpu(tensor):
            raise RuntimeError("a kernel got a tensor of the host")


class _SlotMapping:
    """KV slot of every row, -1 for those that pad."""

    def __call__(
        self,
        num_reqs: int,
        num_tokens: int,
        max_num_tokens: int,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        block_table: torch.Tensor,
        block_table_stride: int,
        slot_mapping: torch.Tensor,
        block_size: int,
        *_: Any,
    ) -> None:
        _on_gpu(query_start_loc, positions, block_table, slot_mapping)
        with inside_a_kernel():
            starts = query_start_loc[: num_reqs + 1]
            end = int(starts[-1])
            requests = torch.arange(num_reqs).repeat_interleave(starts.diff())
            rows = positions[:end]
            blocks = block_table[requests, rows // block_size].long()
            slot_mapping[:end] = blocks * block_size + rows % block_size
            slot_mapping[num_tokens:max_num_tokens] = -1

    def register_warmup(self, *_: Any, **__: Any) -> None: ...


def _top_k_top_p(
    logits: torch.Tensor,  # [requests, vocab]
    k: torch.Tensor | None,  # [requests]
    p: torch.Tensor | None,  # [requests]
    **_: Any,
) -> torch.Tensor:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch

    _on_gpu(logits, *(tensor for tensor in (k, p) if tensor is not None))
    with inside_a_kernel():
        return logits.copy_(apply_top_k_top_p_pytorch(logits, k, p))


def _write_kv(
    key: torch.Tensor,  # [rows, kv_heads, head_size]
    value: torch.Tensor,
    key_cache: torch.Tensor,  # [blocks, block_size, kv_heads, head_size]
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,  # [at most rows]
    *_: Any,
) -> None:
    _on_gpu(key, value, key_cache, value_cache, slot_mapping)

    def write(slot_mapping: torch.Tensor, *pairs: torch.Tensor) -> None:
        rows = (slot_mapping >= 0).nonzero()[:, 0]
        slots = slot_mapping[rows]
        for new, cache in zip(pairs[:2], pairs[2:], strict=True):
            block_size = cache.shape[1]
            cache[slots // block_size, slots % block_size] = new[rows]

    launch(write, slot_mapping, key, value, key_cache, value_cache)


def _flash_attention(
    q: torch.Tensor,  # [rows, heads, head_size]
    k: torch.Tensor,  # [blocks, block_size, kv_heads, head_size]
    v: torch.Tensor,
    out: torch.Tensor,  # like q
    cu_seqlens_q: torch.Tensor,  # [requests + 1]
    seqused_k: torch.Tensor,  # [requests]
    block_table: torch.Tensor,  # [requests, max_blocks]
    softmax_scale: float,
    causal: bool,
    scheduler_metadata: torch.Tensor | None = None,
    **_: Any,
) -> None:
    """Causal attention of each request's last rows over its KV."""
    assert causal
    _on_gpu(q, k, v, out, cu_seqlens_q, seqused_k, block_table)

    def attend(*tensors: torch.Tensor, plan: torch.Tensor | None) -> None:
        q, k, v, out, block_table, cu_seqlens_q, seqused_k = tensors
        if plan is not None and not plan.equal(seqused_k):
            raise RuntimeError("attention by the plan of another batch")
        starts = cu_seqlens_q.tolist()
        for request, length in enumerate(seqused_k.tolist()):
            first, end = starts[request : request + 2]
            if first == end:  # pads the batch of a graph
                continue
            pages = block_table[request].long()
            keys, values = (
                cache[pages].flatten(0, 1)[:length].transpose(0, 1) for cache in (k, v)
            )
            rows = torch.arange(length - (end - first), length)[:, None]
            out[first:end] = torch.nn.functional.scaled_dot_product_attention(
                q[first:end].transpose(0, 1),
                keys,
                values,
                attn_mask=torch.arange(length) <= rows,
                scale=softmax_scale,
                enable_gqa=True,
            ).transpose(0, 1)

    tensors = q, k, v, out, block_table, cu_seqlens_q, seqused_k
    launch(attend, *tensors, plan=scheduler_metadata)


def _plan_attention(cache_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
    """What FlashAttention 3 plans ahead follows from all lengths of a batch."""
    return cache_seqlens.clone()
