# SPDX-License-Identifier: Apache-2.0
"""Tests of the server through its HTTP interface."""

import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported

from engine_fixtures import (  # noqa: E402, F401
    engines,
    head,
    plain,
    target,
)
