# SPDX-License-Identifier: Apache-2.0
"""The method on vLLM's own command line."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest
from tiny_models import TinyModel, save_random_head
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_clover2.heads import add_head

REPO = Path(__file__).parents[2]
# What follows "vllm serve" in the documents, in lines and between backticks.
DOCUMENTED = sorted(
    {
        command
        for path in (REPO / "README.md", *REPO.glob("docs/*.md"))
        for command in re.findall(r"(?m)vllm serve (\S+ -[^`\n]*)", path.read_text())
    }
)


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry of heads of its own, empty."""
    path = tmp_path / "registry" / "heads.json"
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(path))
    return path


@pytest.fixture(scope="module")
def parser() -> FlexibleArgumentParser:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parse(parser: FlexibleArgumentParser, *arguments: str | Path) -> EngineArgs:
    namespace: argparse.Namespace = parser.parse_args([str(a) for a in arguments])
    return AsyncEngineArgs.from_cli_args(namespace)


def test_short_form_finds_the_registered_head(
    parser: FlexibleArgumentParser, target: Path, head: Path
) -> None:
    add_head(str(target), head)
    args = parse(parser, "--model", target, "--speculative-model", "clover2")
    speculative = args.create_engine_config().speculative_config
    assert speculative.method == "clover2"
    assert Path(speculative.model) == head
    assert speculative.num_speculative_tokens == 25


@pytest.mark.parametrize("flag", ["--num-speculative-tokens", "--spec-tokens"])
def test_short_form_with_a_number_of_nodes(
    parser: FlexibleArgumentParser, target: Path, head: Path, flag: str
) -> None:
    add_head(str(target), head)
    args = parse(
        parser, "--model", target, "--speculative-model", "clover2", flag, "12"
    )
    assert args.create_engine_config().speculative_config.num_speculative_tokens == 12


def test_short_form_without_a_head_says_which_are_known(
    parser: FlexibleArgumentParser, target: Path, head: Path, tmp_path: Path
) -> None:
    other = save_random_head(tmp_path / "other-head", TinyModel(hidden_size=64))
    add_head("someone/else", other)
    args = parse(parser, "--model", target, "--speculative-model", "clover2")
    with pytest.raises(ValueError, match="no Clover-2 head is known") as error:
        args.create_engine_config()
    assert f"someone/else -> {other}" in str(error.value)
    assert "vllm-clover2 heads add" in str(error.value)


def test_method_and_model_flags(
    parser: FlexibleArgumentParser, target: Path, head: Path
) -> None:
    args = parse(
        parser,
        *("--model", target, "--spec-method", "clover2", "--spec-model", head),
        *("--spec-tokens", "7"),
    )
    speculative = args.create_engine_config().speculative_config
    assert (speculative.method, speculative.num_speculative_tokens) == ("clover2", 7)


@pytest.mark.parametrize(
    "words",
    [
        ["--speculative-model", "clover2", "--spec-model", "none"],
        ["--speculative-config", '{"method": "clover2", "model": "none"}'],
    ],
    ids=["flags", "json"],
)
def test_without_a_head(
    parser: FlexibleArgumentParser, target: Path, words: list[str]
) -> None:
    args = parse(parser, "--model", target, *words)
    assert not args.create_engine_config().speculative_config.has_head


def test_none_alone_is_asked_back(
    parser: FlexibleArgumentParser, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It might mean no head, or no speculation."""
    with pytest.raises(SystemExit):
        parse(parser, "--model", target, "--speculative-model", "none")
    error = " ".join(capsys.readouterr().err.split())
    assert "--speculative-model clover2 --spec-model none" in error
    assert "leave the option out" in error


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_commands(parser: FlexibleArgumentParser, command: str) -> None:
    target, *words = shlex.split(command)
    assert parse(parser, "--model", target, *words).spec_method == "clover2"


def test_json_form(parser: FlexibleArgumentParser, target: Path, head: Path) -> None:
    options = {"method": "clover2", "model": str(head), "tree": [[0], [1], [0, 0]]}
    args = parse(parser, "--model", target, "--speculative-config", json.dumps(options))
    speculative = args.create_engine_config().speculative_config
    assert speculative.tree_options().static_shape().parents == (0, 0, 1)


def test_dotted_form(parser: FlexibleArgumentParser, target: Path, head: Path) -> None:
    args = parse(
        parser,
        *("--model", target, "--speculative-config.method", "clover2"),
        *("--speculative-config.model", head, "--speculative-config.tree", "static"),
    )
    speculative = args.create_engine_config().speculative_config
    assert speculative.tree_options().tree == "static"


def test_other_speculative_models_are_left_to_vllm(
    parser: FlexibleArgumentParser, target: Path
) -> None:
    args = parse(parser, "--model", target, "--speculative-model", "some/draft")
    assert args.spec_model == "some/draft"
    assert args.spec_method is None
    plain = parse(parser, "--model", target)
    assert plain.spec_model is None
    assert plain.create_engine_config().speculative_config is None
