# SPDX-License-Identifier: Apache-2.0
"""Measuring a `vllm serve` with vLLM's own client, `vllm bench serve`.

The client reads prompts in its ShareGPT format: its custom format would need pandas,
which a vLLM does not come with. Prompts are sent as rendered here, to the completions
endpoint. The server keeps no prefixes, so that each round does the same work.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from vllm_clover2.bench.backend import WARM_UP_TOKENS, engine_arguments
from vllm_clover2.bench.config import BenchmarkConfig
from vllm_clover2.bench.figures import Measured, MeasuredRequest, Steps
from vllm_clover2.bench.prompts import Prompt
from vllm_clover2.bench.server import server

__all__ = ["ServerBackend", "check_client_limits", "read_result"]

# What `vllm bench serve` leaves out of a ShareGPT file, in tokens.
_SHORTEST_PROMPT, _LONGEST_PROMPT, _LONGEST_TOTAL = 4, 1024, 2048


class ServerBackend:
    """A server of vLLM, asked by its own client."""

    def __init__(
        self, config: BenchmarkConfig, method: str, max_model_len: int
    ) -> None:
        self._config = config
        self._log = config.output / f"client-{method}.log"
        self._dataset = config.output / f"client-{method}-prompts.json"
        self._result = config.output / f"client-{method}-result.json"
        self._stack = contextlib.ExitStack()
        arguments = server_arguments(config, method, max_model_len)
        log = config.output / f"server-{method}.log"
        url = self._stack.enter_context(server(arguments, log))
        self._port = urlsplit(url).port

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        self._ask(prompts, len(prompts), WARM_UP_TOKENS)

    def answer(
        self,
        prompts: Sequence[Prompt],
        concurrency: int,
        report: Callable[[int], None],
    ) -> Measured:
        """Answer all prompts; `report` is told when they are done."""
        result = self._ask(prompts, concurrency, self._config.max_tokens)
        report(len(prompts))
        return read_result(result, len(prompts))

    def close(self) -> None:
        self._stack.close()

    def _ask(
        self, prompts: Sequence[Prompt], concurrency: int, max_tokens: int
    ) -> dict[str, Any]:
        """The content of the client's result file."""
        turns = [[{"value": prompt.text}, {"value": ""}] for prompt in prompts]
        content = [{"conversations": conversation} for conversation in turns]
        self._dataset.write_text(json.dumps(content), "utf-8")
        self._result.unlink(missing_ok=True)
        command: list[str | Path] = [
            *(Path(sys.executable).with_name("vllm"), "bench", "serve"),
            *("--backend", "openai", "--model", self._config.target),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--dataset-name", "sharegpt", "--dataset-path", self._dataset),
            *("--sharegpt-output-len", str(max_tokens), "--disable-shuffle"),
            *("--num-prompts", str(len(prompts)), "--no-oversample"),
            *("--max-concurrency", str(concurrency), "--temperature", "0"),
            *("--extra-body", '{"add_special_tokens": false}'),
            *("--save-result", "--save-detailed", "--disable-tqdm"),
            *("--result-dir", self._result.parent),
            *("--result-filename", self._result.name),
        ]
        # The proxy that the environment may name is not for this machine.
        environment = os.environ | {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        with self._log.open("ab") as log:
            done = subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        if done.returncode or not self._result.exists():
            raise RuntimeError(
                f"`vllm bench serve` must end with a result, but stopped with code "
                f"{done.returncode}; its log {self._log} says why"
            )
        return json.loads(self._result.read_text("utf-8"))


def server_arguments(
    config: BenchmarkConfig, method: str, max_model_len: int
) -> list[str]:
    """Words after `vllm serve`: the engine's arguments as options."""
    words = [config.target, "--no-enable-prefix-caching"]
    for name, value in engine_arguments(config, method, max_model_len).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words += [option]
        elif name != "model" and value is not False:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            words += [option, text]
    return words


def check_client_limits(prompts: Sequence[Prompt], max_tokens: int) -> None:
    """Raise ValueError for a prompt that the client would leave out silently."""
    for prompt in prompts:
        length = len(prompt.token_ids)
        if (
            not _SHORTEST_PROMPT <= length <= _LONGEST_PROMPT
            or length + max_tokens > _LONGEST_TOTAL
        ):
            raise ValueError(
                f"`vllm bench serve` takes prompts of {_SHORTEST_PROMPT} to "
                f"{_LONGEST_PROMPT} tokens, with their answers at most "
                f"{_LONGEST_TOTAL}; found one of {length} with --max-tokens "
                f"{max_tokens}; leave out --served, or the prompt that starts "
                f"{prompt.text[:60]!r}"
            )


def read_result(result: dict[str, Any], num_prompts: int) -> Measured:
    """Seconds, requests and steps of a result file of `vllm bench serve`.

    vLLM counts accepted tokens over all requests, and those that a last step accepted
    beyond an answer's end too: tokens/step comes out a little high.

    Raises:
        RuntimeError: not all prompts were answered.
    """
    if result["completed"] != num_prompts:
        error = next(filter(None, result["errors"]), "none that is known")
        raise RuntimeError(
            f"the server must answer all {num_prompts} prompts, but answered "
            f"{result['completed']}; the first error: {error}"
        )
    requests = [
        MeasuredRequest(
            content=text,
            num_tokens=num_tokens,
            first_token_seconds=first,
            decode_seconds=latency - first,
            steps=None,
        )
        for text, num_tokens, first, latency in zip(
            result["generated_texts"],
            result["output_lens"],
            result["ttfts"],
            result["latencies"],
            strict=True,
        )
    ]
    drafts = result.get("spec_decode_num_drafts", 0)
    shares = result.get("spec_decode_per_position_acceptance_rates", [])
    reached = [round(share * drafts) for share in shares]
    while reached and not reached[-1]:  # a tree's nodes are more than its levels
        reached.pop()
    decoded = sum(request.num_tokens - 1 for request in requests)
    steps = Steps(decoded - result.get("spec_decode_accepted_tokens", 0), reached)
    return Measured(result["duration"], requests, steps)
