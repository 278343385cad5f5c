# SPDX-License-Identifier: Apache-2.0
"""The demo's figures, from rounds with known results, and its command line."""

import io
import json
import sys

import demo
import pytest
from demo_report import acceptance, show, summarise
from rich.console import Console
from rich.progress import Progress

from vllm_clover2.bench.engine import Answer, Round
from vllm_clover2.bench.prompts import Prompt

PROMPTS = [
    {"task": "qa", "messages": [{"role": "user", "content": "one"}]},
    {"task": "code", "messages": [{"role": "user", "content": "two"}]},
]


def answer(
    token_ids: list[int], seconds: float, accepted: list[int] | None = None
) -> Answer:
    return Answer("text", token_ids, seconds, 0.5, seconds - 0.5, accepted or [])


@pytest.fixture
def rounds() -> dict[str, list[Round]]:
    plain = Round(8.0, [answer([1] * 4, 4.0), answer([2] * 4, 4.0)], 0.5)
    slow = Round(80.0, plain.answers, 0.5)
    # Answer one: of 4 steps, two accepted 0 drafts, one accepted 1, one accepted 3.
    same = answer([1] * 4, 1.0, [0, 3, 0, 1])
    other = answer([2, 2, 2, 3], 3.0, [0, 0, 0, 0])
    drafted = Round(4.0, [same, other], 0.5)
    return {"none": [plain, slow, plain], "clover2": [drafted] * 3}


def test_speed_is_the_median_round(rounds):
    figures = summarise(PROMPTS, rounds)
    assert figures["none"]["tokens_per_second"] == 1.0
    assert figures["none"]["speedup"] == 1.0
    assert figures["clover2"]["tokens_per_second"] == 2.0
    assert figures["clover2"]["speedup"] == 2.0


def test_acceptance_counts_steps_that_reach_a_position(rounds):
    figures = summarise(PROMPTS, rounds)["clover2"]
    # Of 8 steps, two accepted at least 1 node, one at least 2, one at least 3.
    assert figures["acceptance_by_position"] == [0.25, 0.125, 0.125]
    assert figures["tokens_per_step"] == 1.5
    assert figures["by_task"]["qa"]["acceptance_by_position"] == [0.5, 0.25, 0.25]
    assert figures["by_task"]["qa"]["tokens_per_step"] == 2.0
    assert figures["by_task"]["code"]["tokens_per_step"] == 1.0
    assert acceptance([]) == {"tokens_per_step": 1.0, "acceptance_by_position": []}


def test_one_different_token_is_not_identical(rounds):
    figures = summarise(PROMPTS, rounds)
    assert (figures["none"]["identical"], figures["none"]["prompts"]) == (2, 2)
    assert (figures["clover2"]["identical"], figures["clover2"]["prompts"]) == (1, 2)
    assert figures["clover2"]["by_task"]["code"]["identical"] == 0


def test_one_different_round_is_not_identical(rounds):
    deviating = Round(4.0, [answer([9] * 4, 1.0), answer([2] * 4, 1.0)], 0.5)
    rounds["none"][2] = deviating
    assert summarise(PROMPTS, rounds)["none"]["identical"] == 1


def test_speed_of_a_task_is_that_of_its_requests(rounds):
    figures = summarise(PROMPTS, rounds)["clover2"]
    assert figures["by_task"]["qa"]["speedup"] == 4.0
    assert figures["by_prompt"][1]["speedup"] == pytest.approx(4 / 3)


def test_tables_show_the_figures(rounds):
    console = Console(record=True, width=80)
    show(console, json.loads(json.dumps(summarise(PROMPTS, rounds))))
    text = console.export_text()
    assert "2.00x" in text
    assert "1 of 2" in text
    assert "accepted at position 1, 2, ... 25% 12% 12%" in text


@pytest.mark.parametrize("given", [["clover2"], ["clover2", "none"]])
def test_the_method_to_compare_with_comes_first(monkeypatch, given):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--methods", *given])
    assert demo.parse_args().methods == ["none", "clover2"]


def test_engines_are_told_what_a_user_would_tell_them(monkeypatch):
    words = ["--num-speculative-tokens", "9", "--head", "folder", "--concurrency", "3"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *words])
    args = demo.parse_args()
    arguments = demo.engine_arguments(args, "clover2")
    assert arguments["max_num_seqs"] == 3
    assert arguments["enforce_eager"]
    assert arguments["speculative_config"] == {
        "method": "clover2",
        "model": "folder",
        "num_speculative_tokens": 9,
    }
    chain = demo.engine_arguments(args, "clover2_chain")["speculative_config"]
    assert "num_speculative_tokens" not in chain
    assert "speculative_config" not in demo.engine_arguments(args, "none")


def test_every_stage_is_a_line_where_no_terminal_is(monkeypatch, rounds):
    class FakeEngine:
        last_round = rounds["clover2"][0]

        def __init__(self, arguments, log):
            pass

        def answer(self, token_ids, max_tokens):
            yield from range(1, len(token_ids) + 1)

        def close(self):
            pass

    monkeypatch.setattr(demo, "Engine", FakeEngine)
    words = ["demo.py", "--methods", "clover2", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", words)
    output = io.StringIO()
    console = Console(file=output, force_terminal=False)
    prompts = [Prompt("qa", "one", [5, 6]), Prompt("code", "two", [7])]
    with Progress(console=console, disable=True) as progress:
        found = demo.run(demo.parse_args(), prompts, progress)
    assert found == {"none": [rounds["clover2"][0]], "clover2": [rounds["clover2"][0]]}
    titles = ["vLLM alone", "clover2"]
    expected = [f"{title}: {s}" for title in titles for s in ("warming up", "ready")]
    for title in titles:
        expected += [f"{title}: round 1 of 1", f"{title}: round 1 of 1: 2.0 tokens/s"]
    lines = output.getvalue().splitlines()
    starts = sorted(
        f"{t}: {s}" for t in titles for s in ("loading the model", "loaded")
    )
    assert sorted(lines[:4]) == starts  # side by side
    assert lines[4:] == expected
