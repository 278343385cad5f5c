# SPDX-License-Identifier: Apache-2.0
"""An engine in processes of its own: task in, answers out, as JSON files.

    python engine_process.py TASK ANSWERS

A task has ``llm`` (arguments of ``LLM``), ``requests`` ([token ids, sampling
parameters] each), ``own`` (how many of them to answer with the head's own drafts first)
and ``seed`` of the planted drafts that all of them are answered with then.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answer(llm: LLM, requests: list[list[Any]]) -> list[list[int]]:
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        [SamplingParams(**params) for _, params in requests],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    llm = LLM(**task["llm"])
    own = answer(llm, task["requests"][: task["own"]])
    llm.collective_rpc("plant", args=(task["seed"],))
    planted = answer(llm, task["requests"])
    commits = llm.collective_rpc("planted_commits")
    content = {"own": own, "planted": planted, "commits": commits}
    Path(answer_file).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
