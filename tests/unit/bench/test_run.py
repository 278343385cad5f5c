# SPDX-License-Identifier: Apache-2.0
"""The order of a benchmark's rounds, and what is left when it is interrupted."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vllm_clover2.bench import run
from vllm_clover2.bench.config import BenchmarkConfig
from vllm_clover2.bench.figures import MeasuredRequest, Steps
from vllm_clover2.bench.prompts import Prompt

PROMPTS = [Prompt("qa", "one", [1]), Prompt("code", "two", [2, 2])]


class FakeBackend:
    """Answers at once; `events` has what all of them were asked."""

    events: list[tuple]
    stop_at: int | None

    def __init__(self, config: BenchmarkConfig, method: str, max_model_len: int):
        assert max_model_len == 512
        self.method = method
        self.events.append(("start", method))

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        self.events.append(("warm up", self.method, len(prompts)))

    def answer(
        self, prompts: Sequence[Prompt], concurrency: int, report: Callable
    ) -> tuple:
        self.events.append(("answer", self.method, concurrency))
        if len([e for e in self.events if e[0] == "answer"]) == self.stop_at:
            raise KeyboardInterrupt
        report(len(prompts))
        text = [1, 2, 3] if self.method == "none" else [1, 2, 4]
        steps = Steps(2, [])
        requests = [MeasuredRequest(text, 3, 0.5, 0.5, steps) for _ in prompts]
        return 1.0, requests, Steps.total([steps] * len(prompts))

    def close(self) -> None:
        self.events.append(("close", self.method))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    FakeBackend.events, FakeBackend.stop_at = [], None
    monkeypatch.setattr(run, "EngineBackend", FakeBackend)
    monkeypatch.setattr(run, "prepare", lambda _: (PROMPTS, 512))
    return FakeBackend.events


@pytest.fixture
def config(tmp_path: Path) -> BenchmarkConfig:
    return BenchmarkConfig(
        target="t",
        methods=["ngram"],
        concurrency=[1, 2],
        rounds=2,
        output=tmp_path / "out",
    )


def test_all_are_started_first_and_then_take_turns(
    events: list[tuple], config: BenchmarkConfig
):
    run.benchmark(config)
    assert events[:2] == [("start", "none"), ("start", "ngram")]
    expected: list[tuple] = []
    for load in (1, 2):
        expected += [("warm up", method, load) for method in ("none", "ngram")]
        expected += [("answer", method, load) for method in ("none", "ngram")] * 2
    assert events[2:-2] == expected
    assert sorted(events[-2:]) == [("close", "ngram"), ("close", "none")]


def test_low_loads_need_fewer_prompts(
    events: list[tuple], config: BenchmarkConfig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "prepare", lambda _: (PROMPTS * 3, 512))
    path = run.benchmark(config.model_copy(update={"min_prompts": 3}))
    results = json.loads(path.read_text())["results"]
    by_load = [one["methods"]["ngram"] for one in results]
    assert [one["prompts"] for one in by_load] == [3, 4]
    qa = [one["by_task"]["qa"]["prompts"] for one in by_load]
    assert qa == [2, 2]


def test_every_stage_is_a_line_where_nobody_watches(
    events: list[tuple], config: BenchmarkConfig, capsys: pytest.CaptureFixture[str]
):
    run.benchmark(config)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "none: ready",
        "ngram: ready",
        "1 in flight, round 1, none: 6.0 tokens/s",
    ]


def test_figures_tables_and_plots_are_written(
    events: list[tuple], config: BenchmarkConfig
):
    path = run.benchmark(config)
    assert path == config.output / "results.json"
    names = {path.name for path in config.output.iterdir()}
    assert names == {"results.json", "table.md", "load.png", "tasks.png"}
    content = json.loads(path.read_text())
    assert [result["concurrency"] for result in content["results"]] == [1, 2]
    assert content["settings"]["methods"] == ["none", "ngram"]
    assert {"command", "versions", "git", "cpu", "date"} <= set(content["provenance"])
    assert [prompt["tokens"] for prompt in content["prompts"]] == [1, 2]
    assert len(content["rounds"]) == 8
    plain, drafted = content["rounds"][:2]
    assert [one["differs_at"] for one in plain["requests"]] == [None, None]
    assert [one["differs_at"] for one in drafted["requests"]] == [2, 2]


def test_an_interrupted_run_keeps_its_rounds(
    events: list[tuple], config: BenchmarkConfig
):
    config.output.mkdir()
    (config.output / "table.md").write_text("of an earlier run")
    FakeBackend.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        run.benchmark(config)
    content = json.loads((config.output / "results.json").read_text())
    methods = content["results"][0]["methods"]
    assert len(methods["none"]["tokens_per_second_by_round"]) == 2
    assert len(methods["ngram"]["tokens_per_second_by_round"]) == 1
    assert not (config.output / "table.md").exists()
    assert sorted(events[-2:]) == [("close", "ngram"), ("close", "none")]
