# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 doctor`: what is wrong is found, and named with its mending."""

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TinyModel, save_random_head
from vllm.engine.arg_utils import EngineArgs

from vllm_clover2 import cli, ops
from vllm_clover2.integration.compat import surface
from vllm_clover2.records import chat_template_sha256
from vllm_clover2.train.from_target import target_record
from vllm_clover2.train.hidden import Target


class Report:
    """The findings of one call, by topic."""

    def __init__(self, output: Path, *arguments: object) -> None:
        words = [str(word) for word in arguments]
        self.status = cli.main(["doctor", *words, "--json", str(output)])
        self.findings = json.loads(output.read_text())["findings"]

    def level(self, topic: str, text: str = "") -> str:
        """Of the one finding of this topic that has this text."""
        found = [
            finding["level"]
            for finding in self.findings
            if finding["topic"] == topic and text in finding["text"]
        ]
        assert len(found) == 1, self.findings
        return str(found[0])


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "doctor.json"


def test_a_healthy_set_up(
    target: Path, tmp_path: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = target_record(
        Target.load(str(target), torch.float32, torch.device("cpu"))
    )
    recorded["name"] = target.name
    assert recorded["chat_template_sha256"] == chat_template_sha256(str(target))
    head = save_random_head(tmp_path / "head", TinyModel(), target=recorded)
    arguments = ("--target", target, "--head", head, "--dtype", "float32")
    report = Report(output, *arguments)
    assert report.status == 0
    assert report.level("head and target", "chat template agrees") == "ok"
    for topic in ("versions", "platform", "vLLM's inside", "plugin", "engine"):
        assert report.level(topic) == "ok"
    shown = capsys.readouterr().out
    assert "0 errors" in shown
    # Keys and values of 4 layers, 2 heads, size 32, 4 bytes; the head has 2 layers.
    memory = next(f["text"] for f in report.findings if f["topic"] == "memory")
    parameters = sum(
        t.numel() for t in load_file(target / "model.safetensors").values()
    )
    assert f"target {4 * parameters / 2**20:.0f} MiB, 2.0 KiB of KV" in memory
    assert "1.0 KiB of KV a token (50% of the target's)" in memory


def test_without_a_head_there_is_none_to_look_at(target: Path, output: Path) -> None:
    report = Report(output, "--target", target, "--head", "none")
    assert report.status == 0
    assert report.level("engine") == "ok"
    assert not [f for f in report.findings if f["topic"].startswith("head")]


def test_a_target_without_a_known_head(target: Path, output: Path) -> None:
    report = Report(output, "--target", target)
    assert report.status == 1
    assert report.level("head", "no Clover-2 head is known") == "error"


def test_a_damaged_head(target: Path, tmp_path: Path, output: Path) -> None:
    head = save_random_head(tmp_path, TinyModel())
    weights = load_file(head / "model.safetensors")
    weights["norm.weight"][0] = torch.nan
    save_file(weights, head / "model.safetensors", metadata={"format": "pt"})
    report = Report(output, "--target", target, "--head", head)
    assert report.status == 1
    assert report.level("head", "norm.weight holds NaN") == "error"


RECORDED = {
    "another-name": ({"name": "other"}, "trained for name 'other', here"),
    "another-template": ({"chat_template_sha256": "0"}, "chat_template_sha256 '0'"),
    "nothing": ({}, "is not recorded"),
}


@pytest.mark.parametrize(("record", "text"), RECORDED.values(), ids=RECORDED)
def test_a_head_that_was_trained_for_another_target(
    record: dict[str, str], text: str, target: Path, tmp_path: Path, output: Path
) -> None:
    head = save_random_head(tmp_path, TinyModel(), target=record)
    report = Report(output, "--target", target, "--head", head)
    assert report.status == 0
    assert report.level("head and target", text) == "warning"


def test_a_head_of_other_sizes(target: Path, tmp_path: Path, output: Path) -> None:
    head = save_random_head(tmp_path, TinyModel(hidden_size=192))
    report = Report(output, "--target", target, "--head", head)
    assert report.status == 1
    assert report.level("head and target", "hidden_size 192 of the head") == "error"
    assert report.level("engine", "hidden_size must equal the target's") == "error"


def test_a_plugin_that_vllm_leaves_out(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "someone_elses")
    report = Report(output)
    assert report.status == 1
    assert report.level("plugin", "found 'someone_elses'") == "error"
    fix = next(f["fix"] for f in report.findings if f["topic"] == "plugin")
    assert fix == "export VLLM_PLUGINS=someone_elses,clover2"


def test_a_vllm_that_moved_on(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = {"vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser colour"}
    monkeypatch.setattr(surface, "EXPECTED_CONFIG", moved)
    assert Report(output).level("vLLM's inside", "add_cli_args takes") == "error"
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    assert Report(output).level("vLLM", "vLLM 0.99.0 is installed") == "error"
    monkeypatch.setitem(sys.modules, "vllm", None)
    report = Report(output)
    assert report.status == 1
    assert report.level("vLLM", "cannot be imported") == "error"


def test_what_will_be_slow(
    target: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(ops, "backend", lambda device="cpu": "reference")
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc_minimal.so.4")
    arguments = ("--target", target, "--head", "none", "--dtype", "bfloat16")
    report = Report(output, *arguments, "--enforce-eager")
    assert report.level("speed", "enforce_eager") == "warning"
    assert report.level("speed", "bfloat16 on a processor without") == "warning"
    assert report.level("preloads", "warn that libiomp5.so must") == "warning"
    assert report.level("compiled ops", "slow references") != "ok"
    monkeypatch.undo()
    monkeypatch.setenv("LD_PRELOAD", "libtcmalloc_minimal.so.4:libiomp5.so")
    report = Report(output, *arguments[:4], "--dtype", "float32")
    assert not [f for f in report.findings if f["topic"] == "speed"]
    assert report.level("preloads") == "ok"
    assert report.level("compiled ops") == "ok"


LIMITS: dict[str, dict[str, Any]] = {
    "option": {"speculative_config": {"top_k": 0}},
    "head": {"speculative_config": {"model": "/no/such/head"}},
    "limit": {"pipeline_parallel_size": 2},
}


@pytest.mark.parametrize("arguments", LIMITS.values(), ids=LIMITS)
def test_an_engine_that_does_not_start_names_the_doctor(
    arguments: dict[str, Any], target: Path, head: Path
) -> None:
    speculative = {"method": "clover2", "model": str(head)}
    speculative |= arguments.get("speculative_config", {})
    with pytest.raises(ValueError, match=r"top_k|no such folder|pipeline") as error:
        EngineArgs(
            model=str(target), **(arguments | {"speculative_config": speculative})
        ).create_engine_config()
    assert "vllm-clover2 doctor" in "".join(traceback.format_exception(error.value))
