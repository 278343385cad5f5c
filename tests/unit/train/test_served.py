# SPDX-License-Identifier: Apache-2.0
"""Served evaluation, with an engine that answers by itself."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_clover2 import cli
from vllm_clover2.train import evaluate as offline
from vllm_clover2.train import served
from vllm_clover2.train.config import EvaluateConfig
from vllm_clover2.train.evaluate import ReplayResult, summarise
from vllm_clover2.train.served import (
    count_steps,
    evaluate_served,
    serve_tree,
    speculative_config,
)


def head_of(folder: Path, model_type: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return head_of(tmp_path / "head", "clover2")


@pytest.fixture
def eagle(tmp_path: Path) -> Path:
    return head_of(tmp_path / "eagle", "llama")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("chain:4", {"tree": "chain", "num_speculative_tokens": 4}),
        ("paper", {"tree": "static"}),
        ("dynamic:40", {"tree": "dynamic", "num_speculative_tokens": 40}),
        ("dynamic:9:3", {"tree": "dynamic", "num_speculative_tokens": 9, "depth": 3}),
        (
            "chain:4+context",
            {"tree": "chain", "num_speculative_tokens": 4, "context": True},
        ),
    ],
)
def test_a_tree_is_served_at_its_full_size(
    head: Path, name: str, options: dict[str, Any]
) -> None:
    assert speculative_config(head, name) == {
        "method": "clover2",
        "model": str(head),
        "adaptive": False,
        "context": False,
        **options,
    }


def test_other_heads_are_drafted_with_by_stock_eagle(eagle: Path) -> None:
    assert speculative_config(eagle, "chain:4") == {
        "method": "eagle",
        "model": str(eagle),
        "num_speculative_tokens": 4,
    }


@pytest.mark.parametrize("name", ["paper", "dynamic:25", "chain:4+context"])
def test_stock_eagle_drafts_chains_only(eagle: Path, name: str) -> None:
    message = re.escape(f"must be chain:DEPTH, found '{name}'")
    with pytest.raises(ValueError, match=message):
        speculative_config(eagle, name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bush:3", "a tree is chain:DEPTH\\[\\+context\\], paper, or dynamic"),
        ("dynamic:64", "num_speculative_tokens: Input should be less than or equal to"),
        ("dynamic:20:1", "num_speculative_tokens must be at most 8"),
    ],
)
def test_trees_that_cannot_be_served_are_refused(
    head: Path, name: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        speculative_config(head, name)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_that_is_no_head_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object"):
        speculative_config(tmp_path, "chain:3")


@pytest.mark.parametrize(
    ("accepted", "num_tokens", "steps", "reached"),
    [
        pytest.param([2, 0, 3], 9, 3, [2, 2, 1], id="ends-with-a-full-path"),
        pytest.param([2, 0, 3], 6, 3, [2, 1, 0], id="path-goes-beyond-the-end"),
        pytest.param([2, 0, 3], 8, 3, [2, 2, 1], id="its-own-token-is-beyond"),
        pytest.param([2], 6, 3, [1, 1, 0], id="two-steps-without-a-draft"),
        pytest.param([], 3, 2, [0, 0, 0], id="never-drafted"),
        pytest.param([], 1, 0, [0, 0, 0], id="prefill-only"),
    ],
)
def test_steps_are_counted_as_by_the_replay(
    accepted: list[int], num_tokens: int, steps: int, reached: list[int]
) -> None:
    result = count_steps(accepted, 7, num_tokens, depth=3)
    assert (result.steps, result.reached.tolist()) == (steps, reached)
    assert (result.emitted, result.nodes) == (num_tokens - 1, 7)


def test_figures_are_summed_over_answers_and_by_task() -> None:
    def result(steps: int, emitted: int, reached: list[int]) -> ReplayResult:
        return ReplayResult(steps, emitted, np.array(reached), 2 * steps)

    assert summarise(
        [
            ("b", result(4, 6, [2, 0])),
            ("a", result(1, 3, [1, 1])),
            ("a", result(0, 0, [0, 0])),  # nothing to count
            ("b", result(5, 6, [1, 0])),
        ]
    ) == {
        "tokens_per_step": 1.5,
        "accepted_per_step": 0.5,
        "acceptance_by_depth": [0.4, 0.1],
        "nodes_per_step": 2.0,
        "steps": 10,
        "by_task": {"a": 3.0, "b": 1.3333},
    }


def test_answers_of_one_token_give_no_figures() -> None:
    with pytest.raises(ValueError, match="two tokens or more"):
        summarise([("a", count_steps([], 0, 1, depth=3))])


class FakeEngine:
    """Repeats the recorded answers but the first; one drafted node a step, accepted."""

    def __init__(self, recorded: list[list[int]], **options: Any) -> None:
        self.recorded = recorded
        self.options = options
        self.calls: list[str] = []

    def generate(self, prompts: list[Any], params: Any, **_: Any) -> list[Any]:
        if not isinstance(params, list):
            self.calls.append(f"warm-up {len(prompts)}")
            return []
        self.calls.append("generate")
        self.prompts, self.params = prompts, params
        texts = [[-1, *self.recorded[0][1:]], *self.recorded[1:]]
        return [SimpleNamespace(outputs=[self.completion(text)]) for text in texts]

    def completion(self, text: list[int]) -> Any:
        steps = len(text) // 2  # an even length ends in the middle of a step
        metrics = SimpleNamespace(per_step_accepted=[1] * steps, num_draft_tokens=steps)
        return SimpleNamespace(token_ids=tuple(text), spec_decode_metrics=metrics)

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")


@pytest.fixture
def config(tiny_target: Path, tiny_answers: Path, head: Path) -> EvaluateConfig:
    return EvaluateConfig(
        target=str(tiny_target),
        answers=tiny_answers,
        head=head,
        trees=["chain:2", "paper"],
        max_answers=12,
        max_length=28,  # cuts the longest
        served=True,
        concurrency=3,
        kv_cache_gib=0.5,
    )


def test_recorded_prompts_are_answered_by_the_engine(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = config.answers.read_text().splitlines()[:12]
    records = [json.loads(line) for line in lines]
    recorded = [record["output_token_ids"][:22] for record in records]
    engines: list[FakeEngine] = []

    def llm(**options: Any) -> FakeEngine:
        engines.append(FakeEngine(recorded, **options))
        return engines[-1]

    module = ModuleType("vllm")
    module.LLM = llm  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)

    result = serve_tree(config, "chain:2")
    (engine,) = engines
    assert engine.options == {
        "model": config.target,
        "dtype": "bfloat16",
        "max_model_len": 512,  # the target's own limit
        "max_num_seqs": 3,
        "kv_cache_memory_bytes": 2**29,
        "speculative_config": speculative_config(config.head, "chain:2"),
        "per_request_spec_decode_metrics": "detailed",
    }
    assert engine.calls == ["warm-up 3", "reset", "generate"]
    assert engine.prompts == [
        {"prompt_token_ids": record["prompt_token_ids"]} for record in records
    ]
    assert [p.max_tokens for p in engine.params] == [len(text) for text in recorded]
    assert all(p.temperature == 0.0 for p in engine.params)

    steps = sum(len(text) // 2 for text in recorded)
    tokens = sum(len(text) - 1 for text in recorded)
    assert any(len(text) % 2 == 0 for text in recorded)
    assert result["steps"] == steps
    assert result["tokens_per_step"] == pytest.approx(tokens / steps, abs=1e-4)
    assert result["acceptance_by_depth"] == [1.0, 0.0]
    assert result["nodes_per_step"] == 1.0
    assert set(result["by_task"]) == {"even", "odd"}
    assert (result["answers"], result["identical"]) == (12, 11)
    assert result["tokens_per_second"] > 0


class FakeProcess:
    """Stands in for `subprocess.run`; its engines find the name of their tree."""

    def __init__(self, fails_on: str | None = None) -> None:
        self.fails_on = fails_on
        self.environments: list[dict[str, str]] = []

    def __call__(self, command: list[str], **options: Any) -> Any:
        settings, name, answer = command[3:]
        assert command[:3] == [sys.executable, "-m", served.__name__]
        assert EvaluateConfig.model_validate_json(settings).served
        self.environments.append(options["env"])
        if name == self.fails_on:
            return SimpleNamespace(returncode=1)
        Path(answer).write_text(json.dumps({"name": name}))
        return SimpleNamespace(returncode=0)


def test_every_tree_has_a_process_of_its_own(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = FakeProcess()
    monkeypatch.setattr(subprocess, "run", process)
    config.output, config.threads = tmp_path / "new" / "result.json", 2
    result = evaluate_served(config)
    assert result == {"chain:2": {"name": "chain:2"}, "paper": {"name": "paper"}}
    assert json.loads(config.output.read_text()) == result
    assert [env["OMP_NUM_THREADS"] for env in process.environments] == ["2", "2"]
    assert process.environments[0]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


def test_a_failed_engine_is_an_error_and_loses_no_other_tree(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subprocess, "run", FakeProcess(fails_on="paper"))
    config.output = tmp_path / "result.json"
    with pytest.raises(RuntimeError, match="engine of tree 'paper'.* code 1"):
        evaluate_served(config)
    assert json.loads(config.output.read_text()) == {"chain:2": {"name": "chain:2"}}


def test_no_engine_starts_if_any_tree_is_wrong(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = FakeProcess()
    monkeypatch.setattr(subprocess, "run", process)
    config.trees = ["chain:2", "dynamic:64"]
    with pytest.raises(ValueError, match="dynamic:64"):
        evaluate_served(config)
    assert not process.environments


@pytest.mark.parametrize("flag", ["--served", "--no-served"])
def test_the_command_line_chooses_the_kind_of_evaluation(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(served, "evaluate_served", lambda _: {"kind": "--served"})
    monkeypatch.setattr(offline, "evaluate", lambda _: {"kind": "--no-served"})
    arguments = ["--target", "t", "--head", "h", "--answers", "a"]
    assert cli.main(["evaluate", flag, *arguments]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": flag}
