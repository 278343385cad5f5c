# SPDX-License-Identifier: Apache-2.0
"""An engine in processes of its own: task in, answers out, as JSON files.

    python engine_process.py TASK ANSWERS

A task has ``llm`` (arguments of ``LLM``), ``requests`` ([token ids, sampling
parameters] each), ``own`` (how many of them to answer with the head's own drafts first)
and ``seed`` of the planted drafts that all of them are answered with then; planted is
what a request's ``extra_args`` have under the task's ``truth``, or its first answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput


def answer(llm: LLM, requests: list[list[Any]]) -> list[RequestOutput]:
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [SamplingParams(**params) for _, params in requests],
        use_tqdm=False,
    )


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def ties(outputs: list[RequestOutput]) -> int:
    """Tokens beside which another was as likely, of requests with log-probabilities."""
    count = 0
    for output in outputs:
        for position in output.outputs[0].logprobs or []:
            first, second, *_ = sorted(
                (entry.logprob for entry in position.values()), reverse=True
            )
            count += first == second
    return count


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    llm = LLM(**task["llm"])
    requests = task["requests"]
    own = answer(llm, requests[: task["own"]])
    for (_, params), text in zip(requests, tokens(own)):
        params.setdefault("extra_args", {}).setdefault(task["truth"], text)
    llm.collective_rpc("plant", args=(task["seed"],))
    planted = answer(llm, requests)
    content = {
        "own": tokens(own),
        "planted": tokens(planted),
        "ties": ties(own + planted),
        "ranks": llm.collective_rpc("planted_texts"),
        "stats": llm.collective_rpc("clover2_stats"),
    }
    Path(answer_file).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
