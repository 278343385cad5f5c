# SPDX-License-Identifier: Apache-2.0
"""Tests that text and samples are those of vLLM without speculation."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported

from engine_fixtures import (  # noqa: E402, F401
    baseline,
    commits,
    engines,
    head,
    plain,
    plant,
    target,
)
