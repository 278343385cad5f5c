# SPDX-License-Identifier: Apache-2.0
"""An engine in processes of its own: task in, answers out, as JSON files.

    python engine_process.py TASK ANSWERS

A task has ``llm`` (arguments of ``LLM``), ``requests`` ([token ids, sampling
parameters] each) and ``plant`` (seed of planted drafts, or null).
"""

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    llm = LLM(**task["llm"])
    if task["plant"] is not None:
        llm.collective_rpc("plant", args=(task["plant"],))
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in task["requests"]],
        [SamplingParams(**params) for _, params in task["requests"]],
        use_tqdm=False,
    )
    commits = None
    if task["plant"] is not None:
        commits = llm.collective_rpc("planted_commits")
    answers = [list(output.outputs[0].token_ids) for output in outputs]
    content = {"tokens": answers, "commits": commits}
    Path(answer_file).write_text(json.dumps(content))


if __name__ == "__main__":
    main(*sys.argv[1:])
