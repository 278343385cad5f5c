# SPDX-License-Identifier: Apache-2.0
"""Tests of what vLLM sees of this package: registration, options, errors, draft."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported

import pytest  # noqa: E402
from engine_fixtures import (  # noqa: E402, F401
    baseline,
    commits,
    engines,
    head,
    plain,
    plant,
    target,
)


@pytest.fixture(autouse=True)
def _environment_is_read_anew() -> None:
    """vLLM keeps what it read once an engine has started, also those of other tests."""
    from vllm import envs

    envs.disable_envs_cache()
