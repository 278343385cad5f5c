# SPDX-License-Identifier: Apache-2.0
"""Tests of what vLLM sees of this package: registration, options, errors, draft."""

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
