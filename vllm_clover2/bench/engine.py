# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, which answers prompts round by round.

`Engine` is the handle in the parent; this file is also the child's program. The two
exchange lines of JSON over the child's stdin and stdout; the child's own output, and
that of vLLM, goes to a log.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

__all__ = ["Answer", "Engine", "Round"]

_LOG_TAIL = 2000  # characters
_CLOSE_SECONDS = 20  # a round that takes longer, when interrupted, is cut off


@dataclass(frozen=True)
class Answer:
    """One prompt's answer in one round. Times are in seconds."""

    text: str
    token_ids: list[int]
    seconds: float  # from the start of its prefill to its last token
    first_token_seconds: float  # from its arrival to its first token
    decode_seconds: float  # from its first token to its last
    accepted: list[int]  # drafted tokens accepted by each step that verified some
    # The likeliest tokens at every position, with what vLLM reports of them; where
    # `logprobs` was among the sampling parameters.
    top: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Round:
    """All prompts answered once."""

    seconds: float
    answers: list[Answer]
    longest_step_seconds: float  # of the engine, whatever it did in it

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all requests by the time the round took."""
        return sum(len(answer.token_ids) for answer in self.answers) / self.seconds


class Engine:
    """A process that holds one vLLM engine, ready when the constructor returns.

    Raises:
        RuntimeError: the process stopped; the message has the end of its log.
    """

    # -P: the installed package, also where the current folder is a checkout.
    program: ClassVar[list[str]] = ["-P", "-m", "vllm_clover2.bench.engine"]
    last_round: Round
    dtype: str  # that the target computes in, "float32" for example

    def __init__(
        self,
        llm: dict[str, Any],  # arguments of `vllm.LLM`
        log: Path,
    ) -> None:
        self.log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *self.program, json.dumps(llm)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # so that its whole group can be stopped
            )
        try:
            self.dtype = self._receive().get("dtype", "")
        except BaseException:
            self.close()
            raise

    def answer(
        self,
        prompts: list[list[int]],  # token ids
        max_tokens: int,
        in_flight: int | None = None,  # unfinished requests at a time; None: all
        sampling: list[dict[str, Any]] | None = None,  # each prompt's own parameters
        swing: bool = False,  # between one and `in_flight`
    ) -> Iterator[int]:
        """Answer all `prompts`, yielding how many are done.

        Greedily, unless `sampling`, arguments of `vllm.SamplingParams`, says else. The
        result is in `last_round` when the iterator ends.
        """
        request = {
            "prompts": prompts,
            "max_tokens": max_tokens,
            "in_flight": in_flight or len(prompts),
            "swing": swing,
            "sampling": sampling or [{}] * len(prompts),
        }
        assert self.process.stdin is not None
        # A process that has stopped is reported, with its log, when it is read from.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        while "done" in (message := self._receive()):
            yield message["done"]
        answers = [Answer(**answer) for answer in message["answers"]]
        self.last_round = Round(
            message["seconds"], answers, message["longest_step_seconds"]
        )

    def close(self) -> None:
        """Stop the engine and all its processes."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # ends it
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_CLOSE_SECONDS)
        # vLLM's own processes outlive one that was killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        log = self.log.read_text("utf-8", errors="replace")
        raise RuntimeError(
            f"The engine stopped with code {self.process.returncode}. The end of its "
            f"log, {self.log}:\n{log[-_LOG_TAIL:]}"
        )


def _serve(arguments: dict[str, Any]) -> None:
    """Main function of the engine's process; ends when stdin does."""
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # by file descriptor, because the engine's own processes print too

    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=messages, flush=True)

    # Imported here: the parent's process stays light and leaves vLLM alone.
    from vllm import LLM

    llm = LLM(**arguments, disable_log_stats=False)  # each answer comes with its times
    dtype = str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
    send({"ready": True, "dtype": dtype})
    for line in sys.stdin:
        one = _answer(llm, **json.loads(line), report=lambda done: send({"done": done}))
        send(asdict(one))


def _answer(
    llm: Any,  # vllm.LLM
    prompts: list[list[int]],
    max_tokens: int,
    in_flight: int,
    swing: bool,
    sampling: list[dict[str, Any]],
    report: Callable[[int], None],
) -> Round:
    """Answer all prompts, a sliding window of `in_flight` of them at a time.

    Where the load swings: two of them one by one, then twice `in_flight`, and again.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    # Each round does the same work: a prompt's prefill is not left over from the last.
    llm.reset_prefix_cache()
    params = [
        SamplingParams(
            **({"temperature": 0.0} | own),
            max_tokens=max_tokens,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for own in sampling
    ]
    engine = llm.llm_engine
    answers: dict[int, Answer] = {}
    sent, longest = 0, 0.0
    start = now = time.perf_counter()
    for load, end in _loads(len(prompts), in_flight, swing):
        while len(answers) < end:
            while sent < min(end, len(answers) + load):
                prompt = {"prompt_token_ids": prompts[sent]}
                engine.add_request(str(sent), prompt, params[sent])
                sent += 1
            for output in engine.step():
                answers[int(output.request_id)] = _as_answer(output)
                report(len(answers))
            before, now = now, time.perf_counter()
            longest = max(longest, now - before)
    in_order = [answers[number] for number in range(len(prompts))]
    return Round(now - start, in_order, longest)


def _loads(num_prompts: int, in_flight: int, swing: bool) -> Iterator[tuple[int, int]]:
    """Requests in flight at a time, and the number of prompts answered when it ends."""
    loads, end = itertools.cycle([1, in_flight] if swing else [num_prompts]), 0
    while end < num_prompts:
        load = next(loads)
        end = min(end + 2 * load, num_prompts)
        yield min(load, in_flight), end


def _as_answer(
    output: Any,  # vllm.RequestOutput, finished
) -> Answer:
    completion = output.outputs[0]
    times = output.metrics
    speculation = completion.spec_decode_metrics
    return Answer(
        text=completion.text,
        token_ids=list(completion.token_ids),
        seconds=times.last_token_ts - times.scheduled_ts,
        first_token_seconds=times.first_token_latency,
        decode_seconds=times.last_token_ts - times.first_token_ts,
        accepted=list(speculation.per_step_accepted) if speculation else [],
        top=None
        if completion.logprobs is None
        else [
            [(token, entry.logprob) for token, entry in position.items()]
            for position in completion.logprobs
        ],
    )


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
