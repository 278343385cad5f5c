# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of known results."""

import dataclasses
from pathlib import Path

import matplotlib.image
import pytest
from rich.console import Console

from vllm_clover2.bench.figures import (
    MeasuredRequest,
    MeasuredRound,
    Steps,
    summarise,
)
from vllm_clover2.bench.report import markdown, plot_load, plot_tasks, show


def round_of(method: str, load: int, number: int, seconds: float) -> MeasuredRound:
    steps = Steps(4, [2, 1] if method != "none" else [])
    requests = [
        MeasuredRequest([1, 2, 3, 4, 5], 5, 0.25, seconds / 2, steps) for _ in range(2)
    ]
    total = Steps.total([steps, steps])
    return MeasuredRound(method, load, number, seconds, requests, total)


@pytest.fixture
def results() -> list[dict]:
    rounds = [
        round_of(method, load, number, seconds * number)
        for load in (1, 8)
        for number in (1, 2)
        for method, seconds in (("none", 4.0), ("clover2", 2.0 if number == 1 else 4.0))
    ]
    return summarise(["qa", "code"], rounds)


def test_the_terminal_shows_one_table_a_load(results):
    console = Console(record=True, width=80)
    show(console, results)
    text = console.export_text()
    assert text.index("One request at a time") < text.index("8 requests in flight")
    assert "1.50x" in text
    assert "1.00-2.00" in text
    assert "…" not in text
    assert "2 of 2" in text
    assert "250 ms" in text
    assert "clover2: steps that accepted 1, 2, ... drafted tokens or more: 50% 25%" in (
        text
    )


def test_a_swinging_load_is_named_with_its_longest_steps():
    rounds = [
        dataclasses.replace(round_of(name, 8, 1, 2.0), longest_step_seconds=seconds)
        for name, seconds in (("none", 0.25), ("clover2", 0.5))
    ]
    text = markdown(summarise(["qa", "code"], rounds, swing=True))
    assert text.startswith("1 to 8 requests in flight, up and down:")
    assert "- longest step, prompts among its rows: none 0.25 s, clover2 0.50 s" in text


def test_markdown_has_the_loads_and_the_tasks(results):
    text = markdown(results)
    assert "One request at a time:\n\n| method | tokens/s |" in text
    assert "| none | 1.9 | 1.00x | 1.00x | 250 ms | 1.00 | 1.00x | 2 of 2 |" in text
    clover2 = next(line for line in text.splitlines() if line.startswith("| clover2"))
    assert clover2.startswith("| clover2 | 3.1 | 1.50x (1.00-2.00) |")
    assert "| speed-up by task | clover2 |\n| --- | ---: |\n| qa |" in text
    columns = {line.count("|") for line in text.splitlines() if "tokens/step" in line}
    assert columns == {9}


def test_figures_that_are_unknown_are_dashes(results):
    figures = results[0]["methods"]["clover2"]
    figures |= {"decode_speedup": None, "step_cost": None, "tokens_per_step": None}
    lines = markdown(results).splitlines()
    line = next(line for line in lines if line.startswith("| clover2"))
    assert line.count(" - ") == 3


def test_without_another_method_there_is_no_table_of_tasks(results):
    for result in results:
        del result["methods"]["clover2"]
    assert "by task" not in markdown(results)


@pytest.mark.parametrize("loads", [1, 2], ids=["one load", "two loads"])
@pytest.mark.parametrize("plot", [plot_load, plot_tasks])
def test_plots_are_images(plot, loads, results, tmp_path: Path):
    path = tmp_path / "plot.png"
    plot(results[:loads], path)
    assert path.read_bytes().startswith(b"\x89PNG")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 300
    assert len({tuple(color) for row in pixels[::4] for color in row.tolist()}) > 3


def test_a_gap_in_the_figures_is_a_gap_in_the_plot(results, tmp_path: Path):
    results[0]["methods"]["clover2"]["decode_speedup"] = None
    plot_load(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
