# SPDX-License-Identifier: Apache-2.0
"""Generating answers, with an engine that answers by itself."""

import gzip
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_clover2.train.generate import GenerateConfig, generate, temperature_of


class FakeEngine:
    """Answers [n, temperature x 10] to the prompt "n"; may fail on a prompt."""

    fails_on: str | None = None
    asked: list[str] = []  # noqa: RUF012 - shared on purpose
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        FakeEngine.options = options

    def chat(self, conversations: list[Any], params: list[Any]) -> list[Any]:
        texts = [messages[0]["content"] for messages in conversations]
        if FakeEngine.fails_on in texts:
            raise RuntimeError("engine died")
        FakeEngine.asked += texts
        return [
            SimpleNamespace(
                prompt_token_ids=[7],
                outputs=[
                    SimpleNamespace(
                        finish_reason="stop",
                        token_ids=(int(text), round(p.temperature * 10)),
                    )
                ],
            )
            for text, p in zip(texts, params, strict=True)
        ]


@pytest.fixture(autouse=True)
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM = FakeEngine  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    FakeEngine.fails_on = None
    FakeEngine.asked = []


@pytest.fixture
def config(tmp_path: Path) -> GenerateConfig:
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"id": f"p{n}", "task": "t", "messages": [{"role": "user", "content": str(n)}]}
        for n in range(10)
    ]
    prompts.write_text("\n".join(json.dumps(line) for line in lines))
    target = tmp_path / "target"
    target.mkdir()
    (target / "model.safetensors").write_bytes(bytes(1000))
    return GenerateConfig(
        target=str(target), prompts=prompts, output=tmp_path / "out.jsonl", chunk=3
    )


def answers_of(path: Path) -> list[dict[str, Any]]:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return [json.loads(line) for line in content.splitlines()]


def test_every_prompt_is_answered_with_its_temperature(config: GenerateConfig) -> None:
    answers = answers_of(generate(config))
    assert [answer["id"] for answer in answers] == [f"p{n}" for n in range(10)]
    assert answers[3]["prompt_token_ids"] == [7]
    for number, answer in enumerate(answers):
        temperature = temperature_of(answer["id"], config.temperatures)
        assert answer["temperature"] == temperature
        assert answer["output_token_ids"] == [number, round(temperature * 10)]
    assert len({answer["temperature"] for answer in answers}) > 1


def test_the_kv_cache_is_of_the_given_size(config: GenerateConfig) -> None:
    generate(config)
    assert FakeEngine.options["kv_cache_memory_bytes"] is None  # vLLM's choice
    half = {"kv_cache_gib": 0.5, "output": config.output.with_name("half.jsonl")}
    generate(config.model_copy(update=half))
    assert FakeEngine.options["kv_cache_memory_bytes"] == 2**29


def test_a_stopped_run_continues_where_it_was(config: GenerateConfig) -> None:
    FakeEngine.fails_on = "7"
    with pytest.raises(RuntimeError, match="engine died"):
        generate(config)
    assert not config.output.exists()
    partial = config.output.with_name("out.jsonl.partial")
    with partial.open("a") as stream:
        stream.write('{"id": "p6", "out')  # the power went out here
    FakeEngine.fails_on, FakeEngine.asked = None, []
    answers = answers_of(generate(config))
    assert sorted(answer["id"] for answer in answers) == [f"p{n}" for n in range(10)]
    assert FakeEngine.asked == ["6", "7", "8", "9"]
    assert not partial.exists()


@pytest.fixture
def stopped(config: GenerateConfig) -> GenerateConfig:
    """Of a call that stopped after six prompts."""
    FakeEngine.fails_on = "7"
    with pytest.raises(RuntimeError, match="engine died"):
        generate(config)
    FakeEngine.fails_on, FakeEngine.asked = None, []
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"temperatures": [0.0]},
        {"seed": 1},
        {"max_new_tokens": 8},
        {"max_model_len": 64},
        {"dtype": "float32"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_answers_of_other_settings_are_not_mixed(
    stopped: GenerateConfig, change: dict[str, Any]
) -> None:
    partial = stopped.output.with_name("out.jsonl.partial")
    before = partial.read_bytes()
    with pytest.raises(ValueError, match=rf"{next(iter(change))}.* before, .* now"):
        generate(stopped.model_copy(update=change))
    assert partial.read_bytes() == before
    assert FakeEngine.asked == []
    generate(stopped)  # its record is still that of the first call


def test_answers_of_other_weights_or_prompts_are_not_mixed(
    stopped: GenerateConfig, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(stopped.target, moved)
    (moved / "model.safetensors").write_bytes(bytes(999) + b"1")
    with pytest.raises(ValueError, match="'target': 'sha256"):
        generate(stopped.model_copy(update={"target": str(moved)}))
    prompts = tmp_path / "other.jsonl"
    prompts.write_text(stopped.prompts.read_text().replace('"9"', '"99"'))
    with pytest.raises(ValueError, match="'prompts': "):
        generate(stopped.model_copy(update={"prompts": prompts}))
    # The same weights elsewhere are the same target.
    (moved / "model.safetensors").write_bytes(bytes(1000))
    (moved / "README.md").write_text("moved")
    changes = {"target": str(moved), "chunk": 1, "kv_cache_gib": 1.0}
    assert len(answers_of(generate(stopped.model_copy(update=changes)))) == 10


def test_answers_without_a_record_are_not_continued(stopped: GenerateConfig) -> None:
    stopped.output.with_name("out.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="delete that file to begin anew"):
        generate(stopped)
    stopped.output.with_name("out.jsonl.partial").unlink()
    assert len(answers_of(generate(stopped))) == 10


def test_output_is_packed_when_its_name_says_so(config: GenerateConfig) -> None:
    packed = config.model_copy(
        update={"output": config.output.with_suffix(".jsonl.gz"), "limit": 4}
    )
    assert len(answers_of(generate(packed))) == 4
    assert not list(config.output.parent.glob("*.partial"))


def test_existing_answers_are_not_overwritten(config: GenerateConfig) -> None:
    config.output.write_text("precious")
    with pytest.raises(ValueError, match="exists"):
        generate(config)
    assert config.output.read_text() == "precious"


@pytest.mark.parametrize("line", ["{", '{"id": 1}', '{"messages": []}'])
def test_bad_prompt_lines_are_named(config: GenerateConfig, line: str) -> None:
    with config.prompts.open("a") as stream:
        stream.write("\n" + line)
    with pytest.raises(ValueError, match="line 11"):
        generate(config)
