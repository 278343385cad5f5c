# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by all tests: where the data, the target and the head are."""

import os
from pathlib import Path

import pytest

from vllm_clover2.heads import SHIPPED

REPO = Path(__file__).parents[1]

# Read when OpenMP is loaded, so before torch. Threads that spin while they wait make
# an engine ten times slower as soon as anything else runs on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes side by side share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the soak, see ``make soak``."""
    parser.addoption("--requests", type=int, default=200)
    parser.addoption("--seed", type=int, default=1)
    parser.addoption("--first-round", type=int, default=0)


def existing(path: Path, what: str, variable: str) -> Path:
    """`path`, or a skip that says what is missing and how to supply it."""
    if not path.exists():
        pytest.skip(f"{what} not found at {path}; set {variable}")
    return path


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Training prompts and the target's answers to them."""
    default = REPO.parent / "shared" / "data"
    path = Path(os.environ.get("CLOVER2_DATA_DIR", default))
    return existing(path, "prompt data", "CLOVER2_DATA_DIR")


@pytest.fixture(scope="session")
def target_dir() -> Path:
    """SmolLM2-135M-Instruct as `make` puts it; converted here when it is not there."""
    import smollm2_checkpoint

    path = REPO / smollm2_checkpoint.DEFAULT_OUTPUT
    smollm2_checkpoint.make(path)
    return path


@pytest.fixture(scope="session")
def head_dir() -> Path:
    """The head that ships for SmolLM2-135M-Instruct."""
    return SHIPPED / "smollm2-135m-instruct"
