# SPDX-License-Identifier: Apache-2.0
"""Handling of engine processes: what they answer, and what is said when they stop."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_clover2.bench import engine as module
from vllm_clover2.bench.engine import Answer, Engine, Round


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "program.py"
    monkeypatch.setattr(Engine, "program", [str(path)])
    return path


def test_an_engine_that_does_not_start_shows_its_log(program: Path, tmp_path: Path):
    program.write_text("import sys; sys.exit('out of memory, for example')")
    with pytest.raises(RuntimeError, match="code 1.*(?s:.*)out of memory") as error:
        Engine({}, tmp_path / "engine.log")
    assert str(tmp_path / "engine.log") in str(error.value)


def test_an_engine_that_stops_in_a_round_shows_its_log(program: Path, tmp_path: Path):
    program.write_text(
        "import sys\n"
        "print('{\"ready\": true}', flush=True)\n"
        "sys.stdin.readline()\n"
        "sys.exit('a kernel failed')\n"
    )
    engine = Engine({}, tmp_path / "engine.log")
    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(engine.answer([[1]], max_tokens=2))
    # The next round says so too, rather than that a pipe is broken.
    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(engine.answer([[1]], max_tokens=2))
    engine.close()


def test_an_engine_reports_progress_and_then_the_round(program: Path, tmp_path: Path):
    expected = Round(2.0, [Answer("x", [5, 6], 2.0, 0.5, 1.5, [1])], 0.5)
    program.write_text(
        "import json, sys\n"
        "assert json.loads(sys.argv[1]) == {'model': 'm'}\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    request = json.loads(line)\n"
        "    assert request['in_flight'] == 3, request\n"
        "    assert request['swing'] == (len(request['prompts']) == 1), request\n"
        '    print(\'{"done": 0}\\n{"done": 1}\')\n'
        f"    print({json.dumps(asdict(expected))!r}, flush=True)\n"
    )
    engine = Engine({"model": "m"}, tmp_path / "engine.log")
    answers = engine.answer([[1, 2]], max_tokens=2, in_flight=3, swing=True)
    assert list(answers) == [0, 1]
    assert engine.last_round == expected
    assert engine.last_round.tokens_per_second == 1.0
    # Without a limit all prompts are in flight.
    assert list(engine.answer([[1]] * 3, max_tokens=2)) == [0, 1]
    engine.close()
    assert engine.process.returncode == 0


@pytest.mark.parametrize("end", ["answers", "is killed"])
def test_processes_of_an_engine_do_not_outlive_it(
    end: str, program: Path, tmp_path: Path
):
    program.write_text(
        "import os, signal, subprocess, sys\n"
        "core = subprocess.Popen(['sleep', '99'], stdout=subprocess.DEVNULL)\n"
        "print('{\"ready\": true}', flush=True)\n"
        f"if {end!r} == 'is killed':\n"
        "    sys.stdin.readline()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.stdin.read()\n"
    )
    engine = Engine({}, tmp_path / "engine.log")
    if end == "is killed":
        with pytest.raises(RuntimeError, match="code -9"):
            list(engine.answer([[1]], max_tokens=2))
    group = engine.process.pid
    os.killpg(group, 0)  # something of it is there
    engine.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)  # until its parent, init, has taken note
    raise AssertionError("a process of the engine is still there")


class WindowedEngine:
    """Finishes the request that waited longest, one in every second step."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.most = self.steps = 0

    def add_request(self, request_id: str, prompt: dict, params: object) -> None:
        self.waiting.append(request_id)
        self.most = max(self.most, len(self.waiting))

    def step(self) -> list[SimpleNamespace]:
        self.steps += 1
        if self.steps % 2:
            return []
        number = self.waiting.pop(0 if self.steps % 4 else -1)
        completion = SimpleNamespace(
            text=number,
            token_ids=[int(number)],
            spec_decode_metrics=None,
            logprobs=[{int(number): SimpleNamespace(logprob=-0.5)}],
        )
        times = SimpleNamespace(last_token_ts=3.0, scheduled_ts=1.0, first_token_ts=2.5)
        times.first_token_latency = 1.75
        return [SimpleNamespace(request_id=number, outputs=[completion], metrics=times)]


@pytest.mark.parametrize(("in_flight", "most"), [(1, 1), (3, 3), (9, 5)])
def test_so_many_requests_are_in_flight_and_no_more(in_flight: int, most: int):
    engine, done = WindowedEngine(), []
    llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    prompts = [[number] for number in range(5)]
    one = module._answer(llm, prompts, 4, in_flight, False, [{}] * 5, done.append)
    assert engine.most == most
    assert done == [1, 2, 3, 4, 5]
    assert [answer.token_ids for answer in one.answers] == prompts
    assert one.answers[0] == Answer("0", [0], 2.0, 1.75, 0.5, [], [[(0, -0.5)]])
    assert 0.0 < one.longest_step_seconds < one.seconds


def test_a_swinging_load_goes_up_and_down_until_all_are_answered():
    assert list(module._loads(27, 5, True)) == [
        (1, 2),
        (5, 12),
        (1, 14),
        (5, 24),
        (1, 26),
        (5, 27),
    ]
    assert list(module._loads(27, 5, False)) == [(5, 27)]
