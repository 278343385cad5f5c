# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 verify-lossless` with real engines, ours and one that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_clover2 import cli
from vllm_clover2.bench.engine import Engine

pytestmark = pytest.mark.slow


@pytest.fixture
def verify(
    repeating: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")

    def run() -> tuple[int, dict[str, Any]]:
        options = {
            "target": repeating,
            "head": head,
            "dtype": "float32",
            "max-tokens": 16,
            "max-model-len": 512,
            "kv-cache-gib": 0.05,
            "temperature": 0.1,
            "samples": 300,
            "output": tmp_path,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        status = cli.main(["verify-lossless", "--enforce-eager", *words])
        return status, json.loads((tmp_path / "results.json").read_text())

    return run


def test_our_text_is_exact(verify: Any) -> None:
    status, result = verify()
    assert (status, result["verdict"]) == (0, "exact")
    assert result["accepted"] > 50
    assert result["distribution"]["control_p_value"] < 1e-4


def test_wrong_text_is_found(verify: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(__file__).with_name("wrong_engine.py")
    monkeypatch.setattr(Engine, "program", [str(program)])
    status, result = verify()
    assert (status, result["verdict"]) == (1, "wrong")
    for part in (*result["greedy"].values(), *result["seeded"].values()):
        assert part["verdict"] == "wrong"
    assert result["distribution"]["verdict"] == "wrong"
