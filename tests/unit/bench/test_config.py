# SPDX-License-Identifier: Apache-2.0
"""Settings of the benchmark, and what is refused before an engine starts."""

import json
from pathlib import Path

import pytest
from tiny_models import TinyModel, save_random_head, save_target

from vllm_clover2 import cli
from vllm_clover2.bench import run
from vllm_clover2.bench.config import BenchmarkConfig, speculative_config
from vllm_clover2.bench.prompts import Prompt, read_prompts, tasks_in_turn
from vllm_clover2.bench.served import check_client_limits

SHAPE = TinyModel(hidden_size=64, num_layers=1, num_heads=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), SHAPE)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_head(tmp_path_factory.mktemp("head"), SHAPE)


@pytest.fixture(autouse=True)
def _no_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def start(*_: object) -> None:
        raise AssertionError("an engine is started")

    monkeypatch.setattr(run, "EngineBackend", start)
    monkeypatch.setattr(run, "ServerBackend", start)
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(tmp_path / "heads.json"))


def test_the_method_to_compare_with_comes_first_and_once():
    config = BenchmarkConfig(target="t", methods=["ngram", "none", "ngram"])
    assert config.methods == ["none", "ngram"]


def test_loads_are_sorted():
    assert BenchmarkConfig(target="t", concurrency=[8, 1, 8]).concurrency == [1, 8]


def test_the_load_of_a_served_benchmark_does_not_swing():
    with pytest.raises(ValueError, match="leave out --served or --swing"):
        BenchmarkConfig(target="t", served=True, swing=True)


def test_every_method_is_told_to_vllm_in_its_own_way():
    config = BenchmarkConfig(target="t", head=Path("h"), eagle_head=Path("e"))
    assert speculative_config(config, "none") is None
    assert speculative_config(config, "clover2-no-context") == {
        "method": "clover2",
        "context": False,
        "model": "h",
    }
    assert speculative_config(config, "clover2-context") == {
        "method": "clover2",
        "model": "none",
    }
    assert speculative_config(config, "clover2-chain") == {
        "method": "clover2",
        "tree": "chain",
        "model": "h",
    }
    assert "model" not in (speculative_config(config, "ngram") or {})
    assert (speculative_config(config, "eagle") or {})["model"] == "e"
    # Serving finds the head by itself.
    found = speculative_config(BenchmarkConfig(target="t"), "clover2")
    assert found == {"method": "clover2"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods clover3", "--methods: unknown methods ['clover3']"),
        ("--concurrency 0 1", "--concurrency: Input should be greater than or equal"),
        ("--concurrency one", "--concurrency: Input should be a valid integer"),
        ("--rounds 0", "--rounds: Input should be greater than or equal to 1"),
        ("--methods eagle", "give its folder as --eagle-head"),
        ("--methods suffix", "needs the package arctic-inference"),
        ("--dtype int8", "--dtype: Input should be 'auto', 'bfloat16'"),
        ("--prompts /nowhere", "/nowhere must be a file of prompts"),
        ("--concurrency 64", "concurrency 64 needs at least as many prompts, found 12"),
        ("--max-prompts 1 --concurrency 10", "found 9; give more"),
        ("--max-model-len 4096", "max_model_len must be at most 2048"),
        ("--max-model-len 80", "must fit max_model_len 80, found a prompt of"),
        ("--max-tokens 2040", "and --max-tokens 2040; raise --max-model-len"),
        ("--head /nowhere", "/nowhere/config.json must be a JSON object"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    words: str,
    message: str,
    target: Path,
    head: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("vllm_clover2.bench.config.find_spec", lambda _: None)
    arguments = ["benchmark", "--target", str(target), "--head", str(head)]
    assert cli.main([*arguments, *words.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-clover2: ")
    assert message in error


def test_a_target_without_a_known_head_is_refused(
    target: Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["benchmark", "--target", str(target)]) == 1
    assert "no Clover-2 head is known" in capsys.readouterr().err
    # Who does not measure it needs none.
    config = BenchmarkConfig(target=str(target), methods=["ngram", "clover2-context"])
    prompts, max_model_len = run.prepare(config)
    assert (len(prompts), max_model_len) == (12, 2048)


def test_a_missing_plot_library_is_found_out_first(
    target: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        run.benchmark(BenchmarkConfig(target=str(target), methods=["none"]))


@pytest.mark.parametrize(
    ("option", "kind", "found"),
    [("head", "llama", "'llama'"), ("eagle_head", "clover2", "a Clover-2 head")],
)
def test_a_head_of_the_other_kind_is_refused(
    option: str, kind: str, found: str, target: Path, tmp_path: Path
):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    method = {"head": "clover2", "eagle_head": "eagle"}[option]
    config = BenchmarkConfig(target=str(target), methods=[method], **{option: tmp_path})
    with pytest.raises(ValueError, match=f"found .*{found}"):
        run.prepare(config)


@pytest.mark.parametrize(
    ("length", "max_tokens", "taken"),
    [
        (3, 16, False),
        (4, 16, True),
        (1024, 1024, True),
        (1025, 16, False),
        (1000, 1049, False),
    ],
)
def test_prompts_that_the_client_would_drop_are_refused(
    length: int, max_tokens: int, taken: bool
):
    prompts = [Prompt("all", "text", [1] * length)]
    if taken:
        check_client_limits(prompts, max_tokens)
    else:
        with pytest.raises(ValueError, match=f"4 to 1024 .* found one of {length} "):
            check_client_limits(prompts, max_tokens)


def test_the_limits_of_the_client_are_checked_for_servers_only(
    target: Path, tmp_path: Path
):
    path = tmp_path / "prompts.jsonl"
    message = {"role": "user", "content": "word " * 600}
    path.write_text(json.dumps({"messages": [message]}))
    settings = {"target": str(target), "methods": ["none"], "concurrency": [1]}
    run.prepare(BenchmarkConfig(**settings, prompts=path))
    with pytest.raises(ValueError, match="takes prompts of 4 to 1024 tokens"):
        run.prepare(BenchmarkConfig(**settings, prompts=path, served=True))


def test_prompts_are_rendered_as_the_target_wants_them(target: Path):
    config = BenchmarkConfig(target=str(target), methods=["none"])
    prompts, _ = run.prepare(config)
    assert prompts[0].text.startswith("<s>user: What is the capital of France?")
    assert prompts[0].text.endswith("<s>assistant: ")
    assert prompts[0].token_ids[0] == 1  # the template's <s>, and no second one
    assert prompts[0].token_ids[1] != 1


@pytest.mark.parametrize("line", ['{"messages": []}', "{", "[]", '{"messages": [1]}'])
def test_lines_without_messages_are_refused(line: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"content": "a"}]}\n\n' + line)
    with pytest.raises(ValueError, match="prompts.jsonl must hold .* in line 3"):
        read_prompts(path)


def test_an_empty_file_is_refused(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="found no line"):
        read_prompts(path)


def test_shipped_prompts_are_a_diverse_dozen():
    prompts = read_prompts(BenchmarkConfig(target="t").prompts)
    assert len(prompts) == 12
    assert len({prompt["task"] for prompt in prompts}) >= 6


def test_tasks_take_turns_with_their_first_prompts():
    prompts = [{"task": task} for task in "abacab"]
    kept = tasks_in_turn(prompts, 2)
    assert [prompt["task"] for prompt in kept] == list("abcab")
    assert tasks_in_turn(prompts, None) == [*kept, prompts[-2]]
