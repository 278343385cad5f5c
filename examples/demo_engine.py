# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine of the demo, in a process of its own."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

KV_CACHE_BYTES = 2 << 30  # of each engine; about 45,000 tokens of SmolLM2 in float32
MAX_MODEL_LEN = 2048
WARM_UP = [[{"role": "user", "content": "Count from one to twenty."}]]
LOG_TAIL = 2000


class Method(NamedTuple):
    """A way to generate: its name in tables, and its kind of tree if it drafts."""

    title: str
    tree: str | None


METHODS = {
    "none": Method("vLLM alone", None),
    "clover2_chain": Method("clover2, chain", "chain"),
    "clover2_static": Method("clover2, static tree", "static"),
    "clover2": Method("clover2, dynamic tree", "dynamic"),
}


@dataclass(frozen=True)
class EngineOptions:
    """What all engines of a run share."""

    target: str
    head: str
    dtype: str
    concurrency: int
    max_tokens: int
    num_speculative_tokens: int | None


@dataclass(frozen=True)
class Answer:
    """One prompt's answer in one round."""

    text: str
    token_ids: list[int]
    seconds: float  # from the start of its prefill to its last token
    accepted: list[int]  # [k]: verify steps that accepted exactly k drafted tokens


@dataclass(frozen=True)
class Round:
    """All prompts answered once."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests by the time the round took."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


def median_speed(rounds: list[Round]) -> float:
    """Median tokens/s."""
    return statistics.median(one.tokens_per_second for one in rounds)


class Engine:
    """A process that holds one vLLM engine, warmed up when the constructor returns.

    This file is the process's program; the two exchange lines of JSON. All that vLLM
    prints goes to the file `log`.
    """

    last_round: Round

    def __init__(self, method: str, options: EngineOptions, log: Path) -> None:
        self.log = log
        command = [sys.executable, __file__, method, json.dumps(asdict(options))]
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        self._receive()

    def answer(self, conversations: list[list[dict]]) -> Iterator[int]:
        """Answer all `conversations`, yielding how many are done.

        The result is in `last_round` when the iterator ends.
        """
        print(json.dumps(conversations), file=self.process.stdin, flush=True)
        while "done" in (message := self._receive()):
            yield message["done"]
        answers = [Answer(**answer) for answer in message["answers"]]
        self.last_round = Round(message["seconds"], answers)

    def close(self) -> None:
        """Stop the engine and wait for its process."""
        self.process.communicate()  # closes stdin, which ends the process

    def _receive(self) -> dict[str, Any]:
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        log = self.log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(
            f"The engine stopped with code {self.process.returncode}. The end of its "
            f"log, {self.log}:\n{log[-LOG_TAIL:]}"
        )


def serve(method: str, options: EngineOptions) -> None:
    """Main function of the engine's process; ends when stdin does."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # by file descriptor, because the engine's own processes print too

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    llm = _start(method, options)
    _answer(llm, WARM_UP * options.concurrency, options, lambda _: None)
    send({"ready": method})
    for line in sys.stdin:
        one = _answer(llm, json.loads(line), options, lambda done: send({"done": done}))
        send(asdict(one))


def _start(method: str, options: EngineOptions) -> Any:
    """The engine as a user would make it."""
    # Imported here: the demo's own process stays light and leaves vLLM alone.
    from vllm import LLM

    extra: dict[str, Any] = {}
    if (tree := METHODS[method].tree) is not None:
        speculation = {"method": "clover2", "model": options.head, "tree": tree}
        # A chain is as long as its head was trained for.
        if options.num_speculative_tokens and tree != "chain":
            speculation["num_speculative_tokens"] = options.num_speculative_tokens
        extra["speculative_config"] = speculation
        extra["per_request_spec_decode_metrics"] = "summary"
    return LLM(
        options.target,
        dtype=options.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=options.concurrency,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=True,
        disable_log_stats=False,  # each answer comes with its times
        **extra,
    )


def _answer(
    llm: Any,
    conversations: list[list[dict]],
    options: EngineOptions,
    report: Callable[[int], None],
) -> Round:
    """Answer all `conversations` greedily; `report` is told how many are done."""
    from tqdm import tqdm
    from vllm import SamplingParams

    class Reported(tqdm):
        def display(self, *_: Any, **__: Any) -> None:
            report(self.n)

    # Each round does the same work: a prompt's prefill is not left over from the last.
    llm.reset_prefix_cache()
    sampling = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    start = time.perf_counter()
    outputs = llm.chat(conversations, sampling, use_tqdm=Reported)
    seconds = time.perf_counter() - start
    return Round(seconds, [_as_answer(output) for output in outputs])


def _as_answer(output: Any) -> Answer:
    completion = output.outputs[0]
    speculation = completion.spec_decode_metrics
    return Answer(
        text=completion.text,
        token_ids=list(completion.token_ids),
        seconds=output.metrics.last_token_ts - output.metrics.scheduled_ts,
        accepted=list(speculation.histogram) if speculation else [],
    )


if __name__ == "__main__":
    serve(sys.argv[1], EngineOptions(**json.loads(sys.argv[2])))
