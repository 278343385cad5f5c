# SPDX-License-Identifier: Apache-2.0
"""Tables of a benchmark, for the terminal and as Markdown, and its plots."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["markdown", "plot_load", "plot_tasks", "show"]

_HEADINGS = (
    "method",
    "tokens/s",
    "speed-up",
    "decoding",
    "first token",
    "tokens/step",
    "step cost",
    "identical",
)
_UNKNOWN = dict.fromkeys(("median", "min", "max"), math.nan)  # leaves a gap


def show(console: Console, results: list[dict[str, Any]]) -> None:
    """Print one table for each number of requests in flight."""
    for result in results:
        # Fits 80 columns: no lines between columns, spreads below their medians.
        table = Table(
            title=_title(result),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
        )
        table.add_column(_HEADINGS[0], overflow="fold")
        for heading in _HEADINGS[1:]:
            lines = heading.replace(" ", "\n").replace("/", "\n/")
            table.add_column(lines, justify="right", no_wrap=True)
        for row in _rows(result):
            table.add_row(*(cell.replace(" (", "\n").rstrip(")") for cell in row))
        console.print(table)
        for line in _notes(result):
            console.print(line)


def markdown(results: list[dict[str, Any]]) -> str:
    """The same tables, one per number of requests in flight."""
    blocks = []
    for result in results:
        lines = [
            f"{_title(result)}:",
            "",
            f"| {' | '.join(_HEADINGS)} |",
            f"| --- |{' ---: |' * (len(_HEADINGS) - 1)}",
            *(f"| {' | '.join(row)} |" for row in _rows(result)),
        ]
        if notes := _notes(result):
            lines += ["", *(f"- {line}" for line in notes)]
        lines += ["", *_task_table(result)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _task_table(result: dict[str, Any]) -> list[str]:
    """Markdown lines: what requests of each task gain, prefills included."""
    methods = {name: f for name, f in result["methods"].items() if name != "none"}
    lines = [
        f"| speed-up by task | {' | '.join(methods)} |",
        f"| --- |{' ---: |' * len(methods)}",
    ]
    for task in result["methods"]["none"]["by_task"]:
        cells = [
            _ratio(f["by_task"][task]["request_speedup"]) for f in methods.values()
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    means = [
        f"{figures['mean_over_tasks']['request_speedup']:.2f}x"
        for figures in methods.values()
    ]
    return [*lines, f"| mean | {' | '.join(means)} |"] if methods else []


def _title(result: dict[str, Any]) -> str:
    number = result["concurrency"]
    if result["swing"]:
        return f"1 to {number} requests in flight, up and down"
    return "One request at a time" if number == 1 else f"{number} requests in flight"


def _rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [
            name,
            f"{figures['tokens_per_second']:.1f}",
            _ratio(figures["speedup"]),
            _ratio(figures["decode_speedup"]),
            f"{figures['first_token_seconds'] * 1000:.0f} ms",
            _number(figures["tokens_per_step"]),
            _ratio(figures["step_cost"]),
            f"{figures['identical']} of {figures['prompts']}",
        ]
        for name, figures in result["methods"].items()
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(ratio: dict[str, float] | None) -> str:
    """Median of the rounds, and their spread where there is any."""
    if ratio is None:
        return "-"
    spread = [f"{ratio[bound]:.2f}" for bound in ("min", "max")]
    text = f"{ratio['median']:.2f}x"
    return text if spread[0] == spread[1] else f"{text} ({'-'.join(spread)})"


def _notes(result: dict[str, Any]) -> list[str]:
    methods = result["methods"].items()
    notes = [
        f"{name}: steps that accepted 1, 2, ... drafted tokens or more: "
        + " ".join(f"{share:.0%}" for share in figures["acceptance_by_depth"])
        for name, figures in methods
        if figures["acceptance_by_depth"]
    ]
    if result["swing"]:  # a change of load might be a stall
        longest = [
            f"{name} {figures['longest_step_seconds']:.2f} s"
            for name, figures in methods
        ]
        notes.append(f"longest step, prompts among its rows: {', '.join(longest)}")
    return notes


def plot_load(results: list[dict[str, Any]], path: Path) -> None:
    """Draw speed-ups against the number of requests in flight, as a PNG at `path`.

    The bands go from the slowest to the fastest round. Of all tokens, prompts included:
    decoding cannot be told apart where the prompts of some requests are read in the
    steps in which others decode.
    """
    from matplotlib import ticker

    def draw(axes: Any) -> None:
        (axis,) = axes
        loads = [result["concurrency"] for result in results]
        for method in results[-1]["methods"]:
            if method == "none":
                continue
            ratios = [result["methods"][method]["speedup"] for result in results]
            ratios = [r or _UNKNOWN for r in ratios]
            lows, highs = ([r[bound] for r in ratios] for bound in ("min", "max"))
            medians = [r["median"] for r in ratios]
            (line,) = axis.plot(loads, medians, marker="o", label=method)
            axis.fill_between(loads, lows, highs, color=line.get_color(), alpha=0.2)
        axis.axhline(1.0, color="black", linewidth=1)
        axis.set(xlabel="requests in flight", ylabel="speed-up, prompts included")
        axis.set_xscale("log", base=2)
        axis.set_xticks(loads)
        axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axis.minorticks_off()

    _figure(path, 1, draw)


def plot_tasks(results: list[dict[str, Any]], path: Path) -> None:
    """Draw every task's speed-up at the lowest and the highest load, as a PNG.

    Whiskers go from the slowest to the fastest round.
    """
    shown = results if len(results) == 1 else [results[0], results[-1]]

    def draw(axes: Any) -> None:
        for axis, result in zip(axes, shown):
            methods = [name for name in result["methods"] if name != "none"]
            tasks = list(result["methods"]["none"]["by_task"])
            width = 0.8 / max(1, len(methods))
            for place, method in enumerate(methods):
                by_task = result["methods"][method]["by_task"]
                ratios = [by_task[task]["request_speedup"] for task in tasks]
                medians = [r["median"] for r in ratios]
                axis.bar(
                    [i + (place + 0.5) * width - 0.4 for i in range(len(tasks))],
                    medians,
                    width,
                    label=method,
                    yerr=[
                        [r["median"] - r["min"] for r in ratios],
                        [r["max"] - r["median"] for r in ratios],
                    ],
                )
            axis.axhline(1.0, color="black", linewidth=1)
            axis.set(title=_title(result), ylabel="speed-up of requests")
            axis.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")

    _figure(path, len(shown), draw)


def _figure(path: Path, num_axes: int, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, num_axes, figsize=(5.5 * num_axes, 4), squeeze=False
    )
    draw(axes[0])
    for axis in axes[0]:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.07), "ncols": 2}
            axis.legend(frameon=False, **place)  # above the title, over no bar
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
