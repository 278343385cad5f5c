# SPDX-License-Identifier: Apache-2.0
"""Methods of the demo, and their figures: from rounds to tables and JSON."""

import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vllm_clover2.bench.engine import Answer, Round
from vllm_clover2.bench.figures import Steps


class Method(NamedTuple):
    """A way to generate: its name in tables, and clover2's options if it drafts."""

    title: str
    options: dict[str, Any] | None


METHODS = {
    "none": Method("vLLM alone", None),
    "clover2_chain": Method("clover2, chain", {"tree": "chain"}),
    "clover2_static": Method("clover2, static tree", {"tree": "static"}),
    "clover2_head": Method("clover2, head alone", {"context": False}),
    "clover2": Method("clover2", {}),
}


def median_speed(rounds: list[Round]) -> float:
    """Median tokens/s."""
    return statistics.median(one.tokens_per_second for one in rounds)


def summarise(prompts: list[dict], rounds: dict[str, list[Round]]) -> dict[str, Any]:
    """Figures of each method; `rounds` has "none", which the others are compared to."""
    plain = rounds["none"]
    return {
        method: _overall(own, plain)
        | {
            "by_task": _by_task(prompts, own, plain),
            "by_prompt": _by_prompt(prompts, own, plain),
        }
        for method, own in rounds.items()
    }


def acceptance(answers: Iterable[Answer]) -> dict[str, Any]:
    """Tokens per verify step, and the share of steps that accept position 1, 2, ...

    In a tree, position k is any node of depth k. Empty without speculation.
    """
    steps = Steps.of([length for answer in answers for length in answer.accepted])
    if not steps.num_steps:
        return {"tokens_per_step": 1.0, "acceptance_by_position": []}
    reached = [count / steps.num_steps for count in steps.reached]
    return {
        "tokens_per_step": 1.0 + sum(reached),
        "acceptance_by_position": reached,
    }


def _overall(own: list[Round], plain: list[Round]) -> dict[str, Any]:
    speed = median_speed(own)
    answers = [answer for one in own for answer in one.answers]
    pairs = [_identical(i, own, plain) for i in range(len(plain[0].answers))]
    return {
        "tokens_per_second": speed,
        "tokens_per_second_by_round": [one.tokens_per_second for one in own],
        "speedup": speed / median_speed(plain),
        **acceptance(answers),
        "identical": sum(pairs),
        "prompts": len(pairs),
    }


def _by_task(
    prompts: list[dict], own: list[Round], plain: list[Round]
) -> dict[str, Any]:
    tasks: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        tasks.setdefault(prompt["task"], []).append(index)
    return {task: _part(indices, own, plain) for task, indices in tasks.items()}


def _by_prompt(
    prompts: list[dict], own: list[Round], plain: list[Round]
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt["messages"][-1]["content"],
            "task": prompt["task"],
            "text": own[0].answers[index].text,
            "tokens": len(own[0].answers[index].token_ids),
            **_part([index], own, plain),
        }
        for index, prompt in enumerate(prompts)
    ]


def _part(indices: list[int], own: list[Round], plain: list[Round]) -> dict[str, Any]:
    """Figures of some prompts. Speed is that of a request while it runs."""
    speed = _request_speed(indices, own)
    answers = [one.answers[index] for one in own for index in indices]
    return {
        "tokens_per_second": speed,
        "speedup": speed / _request_speed(indices, plain),
        **acceptance(answers),
        "identical": sum(_identical(index, own, plain) for index in indices),
        "prompts": len(indices),
    }


def _request_speed(indices: list[int], rounds: list[Round]) -> float:
    def speed(one: Round) -> float:
        answers = [one.answers[index] for index in indices]
        tokens = sum(len(answer.token_ids) for answer in answers)
        return tokens / sum(answer.seconds for answer in answers)

    return statistics.median(speed(one) for one in rounds)


def _identical(index: int, own: list[Round], plain: list[Round]) -> bool:
    """Whether an answer has the same tokens in every round as without speculation."""
    expected = plain[0].answers[index].token_ids
    return all(one.answers[index].token_ids == expected for one in own)


def show(console: Console, methods: dict[str, Any]) -> None:
    """Print the comparison of the methods, and the last one prompt by prompt."""
    table = _table("Without and with Clover-2")
    for heading in ("tokens/s", "speed-up", "tokens/step", "identical"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, figures in methods.items():
        table.add_row(
            METHODS[name].title,
            f"{figures['tokens_per_second']:.1f}",
            f"{figures['speedup']:.2f}x",
            f"{figures['tokens_per_step']:.2f}",
            f"{figures['identical']} of {figures['prompts']}",
        )
    console.print(table)
    for name, figures in methods.items():
        if shares := figures["acceptance_by_position"]:
            text = " ".join(f"{share:.0%}" for share in shares)
            console.print(
                f"{METHODS[name].title}: accepted at position 1, 2, ... {text}"
            )
    last = list(methods)[-1]
    if last != "none":
        console.print(_prompt_table(METHODS[last].title, methods[last]["by_prompt"]))


def _prompt_table(title: str, by_prompt: list[dict[str, Any]]) -> Table:
    table = _table(f"Prompt by prompt: {title}")
    table.add_column("prompt", no_wrap=True, max_width=20)
    for heading in ("tokens", "per step", "speed-up", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in by_prompt:
        table.add_row(
            row["task"],
            row["prompt"].replace("\n", " "),
            str(row["tokens"]),
            f"{row['tokens_per_step']:.2f}",
            f"{row['speedup']:.2f}x",
            "yes" if row["identical"] else "no",
        )
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    return table
