# SPDX-License-Identifier: Apache-2.0
"""The implementations under test."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_clover2 import ops
from vllm_clover2.ops import reference

# For paging.py, which the tests of this folder share.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(params=["native", "avx2", "portable", "reference"])
def run_op(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Calls an op by name in one of its implementations.

    `native` is what the library chooses for this machine, `avx2` and `portable` what it
    chooses for lesser ones.
    """
    if request.param == "reference":
        return lambda name, **arguments: getattr(reference, name)(**arguments)
    assert ops.backend("cpu") == "native", "build the ops first (make test does)"
    if request.param != "native":
        monkeypatch.setenv("CLOVER2_CPU_ISA", request.param)
    return lambda name, **arguments: getattr(torch.ops.clover2, name)(**arguments)
