# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 benchmark`: methods side by side, rounds in turn, figures and tables.

An engine (or server) per method is started, all before the first round, and stays. For
every number of requests in flight the methods take turns, round by round, while the
others idle, so that what else happens on the machine happens to all of them.
"""

import contextlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from vllm_clover2.bench import report
from vllm_clover2.bench.backend import Backend, EngineBackend
from vllm_clover2.bench.config import METHODS, BenchmarkConfig
from vllm_clover2.bench.figures import MeasuredRound, first_difference, summarise
from vllm_clover2.bench.prompts import (
    Prompt,
    read_prompts,
    render,
    tasks_in_turn,
)
from vllm_clover2.bench.served import ServerBackend, check_client_limits
from vllm_clover2.records import provenance, write_json

__all__ = ["benchmark", "prepare"]

_DEFAULT_MODEL_LEN = 2048


def prepare(config: BenchmarkConfig) -> tuple[list[Prompt], int]:
    """The prompts and the engines' max_model_len.

    Whatever can be found wrong is, before it costs the time to start an engine.

    Raises:
        ValueError: a setting cannot work with this target, these prompts or heads.
    """
    from transformers import AutoConfig

    records = tasks_in_turn(read_prompts(config.prompts), config.max_prompts)
    if len(records) < config.concurrency[-1]:
        raise ValueError(
            f"concurrency {config.concurrency[-1]} needs at least as many prompts, "
            f"found {len(records)}; give more with --prompts or --max-prompts, or "
            "lower --concurrency"
        )
    target_config = AutoConfig.from_pretrained(config.target)
    _check_heads(config, target_config)
    limit = target_config.get_text_config().max_position_embeddings
    max_model_len = config.max_model_len or min(_DEFAULT_MODEL_LEN, limit)
    if max_model_len > limit:
        raise ValueError(
            f"max_model_len must be at most {limit}, the limit of {config.target}, "
            f"found {max_model_len}"
        )
    prompts = render(records, config.target)
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if (length := len(longest.token_ids)) + config.max_tokens > max_model_len:
        raise ValueError(
            f"prompt and answer must fit max_model_len {max_model_len}, found a prompt "
            f"of {length} tokens and --max-tokens {config.max_tokens}; raise "
            f"--max-model-len, lower --max-tokens, or leave out the prompt that starts "
            f"{longest.text[:60]!r}"
        )
    if config.served:
        check_client_limits(prompts, config.max_tokens)
    return prompts, max_model_len


def _check_heads(config: BenchmarkConfig, target_config: Any) -> None:
    """Raise ValueError unless there is a head of the right kind for every method."""
    from vllm_clover2.heads import find_head
    from vllm_clover2.train.architectures import head_model_type

    wanted = [METHODS[name] or {} for name in config.methods]
    kinds = {one.get("method") for one in wanted if "model" not in one}
    if "clover2" in kinds:
        head = config.head or find_head(config.target, target_config)
        if (found := head_model_type(head)) != "clover2":
            raise ValueError(
                f"--head must be the folder of a Clover-2 head, found model_type "
                f"{found!r} in {head}"
            )
    eagle_head = config.eagle_head if "eagle" in kinds else None
    if eagle_head is not None and head_model_type(eagle_head) == "clover2":
        raise ValueError(
            f"--eagle-head must be the folder of an EAGLE head, found a Clover-2 "
            f"head in {eagle_head}"
        )


def benchmark(config: BenchmarkConfig) -> Path:
    """Measure all methods at every concurrency; returns the file of figures.

    Figures are written after every round, so that an interrupted run keeps them;
    tables and plots at the end.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "plots need the package matplotlib, which is not installed; "
            "`pip install matplotlib`"
        )
    prompts, max_model_len = prepare(config)
    config.output.mkdir(parents=True, exist_ok=True)
    table, load, tasks = (
        config.output / name for name in ("table.md", "load.png", "tasks.png")
    )
    for old in (table, load, tasks):  # not to be taken for those of this run
        old.unlink(missing_ok=True)
    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        Elapsed(),
    )
    # Where nobody watches, one line a stage is all.
    watched = console.is_terminal
    with Progress(
        *columns, console=console, transient=True, disable=not watched
    ) as progress:
        rounds = _measure(config, prompts, max_model_len, progress)
    results = summarise([prompt.task for prompt in prompts], rounds, config.swing)
    report.show(console, results)
    table.write_text(report.markdown(results), "utf-8")
    report.plot_load(results, load)
    report.plot_tasks(results, tasks)
    return config.output / "results.json"


def _measure(
    config: BenchmarkConfig,
    prompts: list[Prompt],
    max_model_len: int,
    progress: Progress,
) -> list[MeasuredRound]:
    """Start all backends, then let them take turns."""
    say = progress.console.print
    start = ServerBackend if config.served else EngineBackend
    rounds: list[MeasuredRound] = []
    with contextlib.ExitStack() as stack:
        backends: dict[str, Backend] = {}
        for method in config.methods:
            bar = progress.add_task(f"starting {method}", total=None)
            backends[method] = start(config, method, max_model_len)
            stack.callback(backends[method].close)
            progress.remove_task(bar)
            say(f"{method}: ready")
        for concurrency in config.concurrency:
            taken = prompts[: config.prompts_at(concurrency)]
            for backend in backends.values():
                backend.warm_up(taken[:concurrency])
            for number in range(1, config.rounds + 1):
                for method, backend in backends.items():
                    stage = f"{concurrency} in flight, round {number}, {method}"
                    bar = progress.add_task(stage, total=len(taken))
                    measured = backend.answer(
                        taken,
                        concurrency,
                        partial(_advance, progress, bar),
                    )
                    progress.remove_task(bar)
                    one = MeasuredRound(method, concurrency, number, *measured)
                    say(f"{stage}: {one.tokens_per_second:.1f} tokens/s")
                    rounds.append(one)
                    _write(config, prompts, rounds)
    return rounds


def _advance(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def _write(
    config: BenchmarkConfig, prompts: list[Prompt], rounds: list[MeasuredRound]
) -> None:
    """All that is known so far."""
    content = {
        "results": summarise([prompt.task for prompt in prompts], rounds, config.swing),
        "settings": config.model_dump(mode="json"),
        "provenance": provenance(),
        "prompts": [
            {"task": prompt.task, "tokens": len(prompt.token_ids), "text": prompt.text}
            for prompt in prompts
        ],
        "rounds": [_as_json(one, rounds) for one in rounds],
    }
    write_json(config.output / "results.json", content)


def _as_json(one: MeasuredRound, rounds: list[MeasuredRound]) -> dict[str, Any]:
    """A round's requests one by one; `differs_at` says where a text is another."""
    plain = next(
        other
        for other in rounds
        if (other.method, other.concurrency, other.number)
        == ("none", one.concurrency, one.number)
    )
    return {
        "method": one.method,
        "concurrency": one.concurrency,
        "round": one.number,
        "seconds": one.seconds,
        "longest_step_seconds": one.longest_step_seconds,
        "requests": [
            {
                "tokens": request.num_tokens,
                "first_token_seconds": request.first_token_seconds,
                "decode_seconds": request.decode_seconds,
                "steps": request.steps and request.steps._asdict(),
                "differs_at": first_difference(request.content, without.content),
            }
            for request, without in zip(one.requests, plain.requests)
        ],
    }
