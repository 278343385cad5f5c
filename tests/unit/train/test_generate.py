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
from transformers import LlamaConfig

from vllm_clover2.train.data import read_answers
from vllm_clover2.train.generate import GenerateConfig, generate, temperature_of


class FakeEngine:
    """Answers [n, temperature x 10] to the prompt "n"; may fail on a prompt."""

    fails_on: str | None = None
    asked: list[Any] = []  # noqa: RUF012 - shared on purpose
    options: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        FakeEngine.options = options

    def generate(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        """Goes on from [..., n] with [n + 1, temperature x 10]."""
        FakeEngine.asked += [len(prompt["prompt_token_ids"]) for prompt in prompts]
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    SimpleNamespace(
                        finish_reason="length",
                        token_ids=(
                            prompt["prompt_token_ids"][-1] + 1,
                            round(p.temperature * 10),
                        ),
                    )
                ],
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]

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


@pytest.fixture
def continuing(config: GenerateConfig) -> GenerateConfig:
    """Of three greedy answers and a sampled one, 40 tokens of prompt, 30 of answer."""
    LlamaConfig(vocab_size=1000).save_pretrained(config.target)
    lines = [text(f"t{n}", 100 * n, 0.7 if n == 3 else 0.0) for n in range(4)]
    path = config.prompts.with_name("answers.jsonl")
    path.write_text("\n".join(json.dumps(line) for line in lines))
    update = {"prompts": None, "continue_from": path, "starts": 8}
    return config.model_copy(update=update)


OPENING = list(range(990, 1000))


def text(name: str, first: int, temperature: float = 0.0) -> dict[str, Any]:
    return {
        "id": name,
        "temperature": temperature,
        "prompt_token_ids": OPENING + list(range(first, first + 30)),
        "output_token_ids": list(range(first + 30, first + 60)),
    }


def test_texts_go_on_from_their_middle(continuing: GenerateConfig) -> None:
    generate(continuing)
    texts = read_answers(continuing.continue_from or Path(), 1000)
    found = read_answers(continuing.output, 1000)
    assert len(set(found.ids)) == len(found) == 32
    for index, name in enumerate(found.ids):
        origin, _, place = name.partition("@")
        assert found.origins[index] == origin
        assert found.prompt_lens[index] == int(place) >= 32
        whole = texts.answer(texts.ids.index(origin))
        prefix = found.answer(index)[: int(place)]
        assert prefix.tolist() == whole[: int(place)].tolist()
        if found.temperatures[index] == 0:  # otherwise it would only be repeated
            assert int(place) < 40 or origin == "t3"
    assert len(set(found.temperatures)) == 3
    # One text's starts are asked for together: the prefix cache holds their beginning.
    assert found.origins == sorted(found.origins)


def test_what_continues_a_held_out_text_is_held_out(continuing: GenerateConfig) -> None:
    found = read_answers(generate(continuing), 1000)
    train, held_out = (
        {found.origins[index] for index in part} for part in found.split(0.5)
    )
    assert train
    assert held_out
    assert not train & held_out


def test_texts_of_the_evaluation_are_not_continued(
    continuing: GenerateConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = text("eval", 500)
    other["prompt_token_ids"][20:32] = range(130, 142)  # twelve tokens of t1's answer
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps(other))
    found = read_answers(
        generate(continuing.model_copy(update={"exclude": [path]})), 1000
    )
    assert set(found.origins) == {"t0", "t2", "t3"}  # though all share OPENING
    assert "1 texts of" in caplog.text


def test_repeated_texts_are_continued_once(continuing: GenerateConfig) -> None:
    path = continuing.continue_from or Path()
    again = text("again", 0)
    path.write_text(path.read_text() + "\n" + json.dumps(again))
    assert set(read_answers(generate(continuing), 1000).origins) == {
        "t0",
        "t1",
        "t2",
        "t3",
    }


def test_continuing_goes_on_where_it_was(continuing: GenerateConfig) -> None:
    whole = generate(continuing).read_text()
    continuing.output.unlink()
    partial = continuing.output.with_name("out.jsonl.partial")
    partial.write_text("".join(whole.splitlines(keepends=True)[:10]))
    FakeEngine.asked = []
    assert generate(continuing).read_text() == whole
    assert len(FakeEngine.asked) == 22
    partial.write_text(whole)
    continuing.output.unlink()
    with pytest.raises(ValueError, match="'starts': '8 before, 2 now'"):
        generate(continuing.model_copy(update={"starts": 2}))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"temperatures": [0.0]}, "above 0"),
        ({"max_model_len": 32}, "none of the 4 texts"),
        ({"exclude": "itself"}, "4 are repeated or share 12 tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(
    continuing: GenerateConfig, change: dict[str, Any], problem: str
) -> None:
    if "exclude" in change:
        change = {"exclude": [continuing.continue_from]}
    with pytest.raises(ValueError, match=problem):
        generate(continuing.model_copy(update=change))
    assert not FakeEngine.asked


def test_one_source_is_given() -> None:
    for sources in ({}, {"prompts": "p", "continue_from": "a"}):
        with pytest.raises(ValueError, match="either prompts or continue_from"):
            GenerateConfig(target="t", output="o", **sources)
