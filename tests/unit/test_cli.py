# SPDX-License-Identifier: Apache-2.0
"""The command line: options from settings, errors as one line."""

import shutil
import sys
from pathlib import Path

import pytest

from vllm_clover2 import cli
from vllm_clover2.heads import SHIPPED
from vllm_clover2.train.config import TrainConfig


def parsed(arguments: list[str]) -> TrainConfig:
    namespace = cli._parser().parse_args(arguments)  # noqa: SLF001
    settings = cli._settings_of(namespace)  # noqa: SLF001
    assert isinstance(settings, TrainConfig)
    return settings


def test_every_setting_is_an_option() -> None:
    options = {
        "--target": "t",
        "--answers": "a.jsonl",
        "--output": "o",
        "--steps": "30",
        "--warmup-steps": "5",
        "--learning-rate": "0.01",
        "--draft-vocab-size": "9",
        "--init-layers": "first",
        "--hidden-cache": "cache",
    }
    words = [word for option in options.items() for word in option]
    lists = ["--aux-hidden-state-layers", "3", "16", "--temperatures", "0", "0.7"]
    settings = parsed(["train", *words, "--compile-loss", *lists])
    assert settings == TrainConfig(
        target="t",
        answers=Path("a.jsonl"),
        output=Path("o"),
        steps=30,
        warmup_steps=5,
        learning_rate=0.01,
        draft_vocab_size=9,
        compile_loss=True,
        init_layers="first",
        hidden_cache=Path("cache"),
        aux_hidden_state_layers=[3, 16],
        temperatures=[0.0, 0.7],
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--steps x", "--steps: Input should be a valid integer"),
        ("--steps 0", "--steps: Input should be greater than or equal to 1"),
        ("--init-layers middle", "--init-layers: Input should be 'last'"),
        ("--steps 50", "warmup_steps must be below steps"),
    ],
)
def test_wrong_values_are_one_line(
    extra: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--target", "t", "--answers", "a", "--output", "o"]
    assert cli.main([*arguments, *extra.split()]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vllm-clover2: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    commands = ("generate", "train", "evaluate", "explain", "benchmark", "convert")
    for command in (*commands, "heads", "doctor", "verify-lossless"):
        with pytest.raises(SystemExit) as exit_status:
            cli.main([command, "--help"])
        assert exit_status.value.code == 0
    assert "heads" in capsys.readouterr().out


def test_heads_are_added_listed_and_removed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(tmp_path / "heads.json"))
    folder = tmp_path / "head"
    shutil.copytree(SHIPPED / "smollm2-135m-instruct", folder)
    assert cli.main(["heads", "add", "org/model", str(folder)]) == 0
    assert cli.main(["heads", "list"]) == 0
    shown = capsys.readouterr().out
    assert f"org/model -> {folder} (added)" in shown
    assert "SmolLM2-135M-Instruct -> " in shown
    (folder / "config.json").unlink()
    assert cli.main(["heads", "list"]) == 0
    assert f"{folder} (added, unusable: " in capsys.readouterr().out
    assert cli.main(["heads", "remove", "org/model"]) == 0
    assert cli.main(["heads", "remove", "org/model"]) == 1
    assert "no head was added" in capsys.readouterr().err


def test_missing_files_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["convert", "/nowhere/weights.bin", "/nowhere/out"]) == 1
    assert "config.json is missing" in capsys.readouterr().err


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "vllm_clover2.train.loop", raising=False)
    words = ["train", "--target", "t", "--answers", "a", "--output", "o"]
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "train needs the package accelerate" in error
    assert "pip install 'vllm-clover2[train]'" in error
