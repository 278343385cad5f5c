# SPDX-License-Identifier: Apache-2.0
"""Tests that text and samples are those of vLLM without speculation."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported

from engine_fixtures import (  # noqa: E402, F401
    assert_exact,
    baseline,
    clover2,
    commits,
    engine,
    engines,
    head,
    plain,
    plant,
    repeating,
    run_planted,
    target,
)


@pytest.fixture(scope="session", autouse=True)
def _end_quickly() -> Iterator[None]:
    """When a process ends vLLM collects garbage for each of its engines: minutes."""
    yield
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = lambda: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines last: they change torch's threads, and quick failures come first.

    Of these the longest files first, for which the other test process would wait.
    """
    tests = Path(__file__).parents[1]
    folders = [tests / name for name in ("integration", "lossless", "e2e")]

    def place(item: pytest.Item) -> tuple[bool, bool]:
        starts_engines = any(folder in item.path.parents for folder in folders)
        return starts_engines, item.path.name != "test_processes.py"

    items.sort(key=place)
