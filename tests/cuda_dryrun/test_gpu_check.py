# SPDX-License-Identifier: Apache-2.0
"""``kernels/cuda/check.py``, the one command for whoever has a GPU."""

import sys
from pathlib import Path

import pytest
from stock_vllm import RELEASES, run

from vllm_clover2.bench.engine import Engine

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "cuda"))

import tiny_engine  # noqa: E402


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_asks_ops_and_engines(tmp_path: Path) -> None:
    report = run("gpu_check.py", RELEASES[-1], tmp_path)
    ops = {check["op"] for check in report["checks"]}
    assert ops == {"tree_attention", "tree_accept", "commit_kv", "context_nodes"}
    assert all(check["ok"] for check in report["checks"])
    assert [engine["dtype"] for engine in report["engines"]] == ["bfloat16"]
    for engine in report["engines"]:
        assert engine["verdict"] == "exact"
        assert engine["accepted"] > 0
        assert engine["ok"]
        assert engine["logs"].keys() == {"engine-clover2.log", "engine-none.log"}
    assert report["gpu"]


def test_an_engine_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "program", ["-c", "raise SystemExit('no such GPU')"])
    models = tiny_engine.save_models(tmp_path)
    found = tiny_engine.check_engine(tmp_path / "float32", *models, "float32")
    assert not found["ok"]
    assert "stopped with code 1" in found["error"]
    assert found["logs"] == {"engine-none.log": "no such GPU\n"}


def test_engines_need_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny_engine.why_not() is None
    monkeypatch.setattr(tiny_engine, "entry_points", lambda group: [])
    assert "this package is not installed" in tiny_engine.why_not()
    monkeypatch.setattr(tiny_engine, "find_spec", lambda name: None)
    assert tiny_engine.why_not() == "vLLM is not installed"
