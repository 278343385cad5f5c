# SPDX-License-Identifier: Apache-2.0
"""Entry point ``vllm.general_plugins``: makes vLLM know the method ``clover2``.

vLLM calls :func:`register` once in each of its processes (API server, engine core,
workers) before it reads the command line or builds a configuration.
"""

_registered = False


def register() -> None:
    """Install the patches for the running vLLM; safe to call more than once.

    On a vLLM that this release was not written for nothing is patched except that
    asking for ``clover2`` raises one paragraph which names both versions.
    """
    global _registered
    if _registered:
        return
    _registered = True

    from vllm_clover2.integration import compat

    compat.install()


def is_registered() -> bool:
    """Whether vLLM called :func:`register` in this process."""
    return _registered
