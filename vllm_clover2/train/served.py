# SPDX-License-Identifier: Apache-2.0
"""Served evaluation: what a head accepts, and how fast, when vLLM serves with it.

The prompts of recorded greedy answers are answered again by an engine, once per tree,
and every verify step is counted the way the offline replay counts it.  Where the target
is deterministic the texts are the recorded ones, and a chain's or a static tree's
counts are those of the replay, up to rounding: below a float32 target, trees are grown
in the dtype of the head's file.  A dynamic tree may be shallower than the replay's on
the CPU, where growing stops at levels that are unlikely to be reached.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from vllm_clover2.bench.figures import accepted_by_step
from vllm_clover2.records import write_json
from vllm_clover2.train.architectures import head_model_type
from vllm_clover2.train.config import EvaluateConfig
from vllm_clover2.train.data import AnswerSet, read_answers
from vllm_clover2.train.evaluate import ReplayResult, parse_tree, summarise
from vllm_clover2.tree import MAX_ROWS

__all__ = [
    "count_steps",
    "evaluate_served",
    "serve_tree",
    "speculative_config",
]

_WARM_UP_TOKENS = 16
# vLLM compiles anew (two minutes for SmolLM2-135M on two cores) for every length limit.
_LENGTH_STEP = 1024


def speculative_config(head: Path, name: str) -> dict[str, Any]:
    """What vLLM is told for the tree `name`: clover2, or its own EAGLE for its heads.

    Raises ValueError if there is no such tree, or none for this kind of head.
    """
    tree = parse_tree(name)
    if (model_type := head_model_type(head)) != "clover2":
        if tree.tree != "chain" or tree.context:
            raise ValueError(
                f"stock EAGLE drafts chains only: the tree for {head} (model_type "
                f"{model_type!r}) must be chain:DEPTH, found {name!r}; leave it out "
                "with --trees, or give a clover2 head"
            )
        nodes = tree.num_nodes
        return {"method": "eagle", "model": str(head), "num_speculative_tokens": nodes}
    options = tree.model_dump(exclude_unset=True)
    return {"method": "clover2", "model": str(head), **options}


def count_steps(
    accepted: Sequence[int],  # nodes that each verify step accepted, in order
    num_nodes: int,  # drafted in all these steps
    num_tokens: int,  # of the answer
    depth: int,
) -> ReplayResult:
    """One served answer, counted as the replay counts it."""
    paths = np.array(accepted_by_step(accepted, num_tokens), dtype=np.int64)
    return ReplayResult(
        steps=len(paths),
        emitted=num_tokens - 1,
        reached=(np.arange(depth) < paths[:, None]).sum(axis=0),
        nodes=num_nodes,
    )


def serve_tree(config: EvaluateConfig, name: str) -> dict[str, object]:
    """Answer the recorded prompts in an engine of this process, with one tree."""
    answers, target = _read(config)
    # Room for a last tree: near the limit drafts are trimmed, or there are none.
    longest = int(answers.lengths.max()) + MAX_ROWS
    room = -(-longest // _LENGTH_STEP) * _LENGTH_STEP
    # Only this needs the engine, and only through its public interface.
    from vllm import LLM

    llm = LLM(
        model=config.target,
        dtype="bfloat16" if config.precision == "bf16" else "float32",
        max_model_len=min(room, target.max_position_embeddings),
        max_num_seqs=config.concurrency,
        kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
        speculative_config=speculative_config(config.head, name),
        # Accepted nodes step by step, so that a path beyond the end can be cut.
        per_request_spec_decode_metrics="detailed",
    )
    outputs, seconds = _answer(llm, answers, config.concurrency)
    depth = parse_tree(name).max_depth
    results = []
    for task, output in zip(answers.tasks, outputs, strict=True):
        speculation = output.spec_decode_metrics
        steps = speculation.per_step_accepted if speculation else []
        nodes = speculation.num_draft_tokens if speculation else 0
        results.append((task, count_steps(steps, nodes, len(output.token_ids), depth)))
    identical = sum(
        list(output.token_ids) == recorded
        for output, recorded in zip(outputs, _outputs(answers), strict=True)
    )
    num_tokens = sum(len(output.token_ids) for output in outputs)
    return {
        **summarise(results),
        "answers": len(answers),
        "identical": identical,
        "tokens_per_second": round(num_tokens / seconds, 2),
    }


def _read(config: EvaluateConfig) -> tuple[AnswerSet, Any]:
    """The recorded answers and the target's text config."""
    target = AutoConfig.from_pretrained(config.target).get_text_config()
    answers = read_answers(
        config.answers, target.vocab_size, config.max_length, config.max_answers
    )
    return answers, target


def _outputs(answers: AnswerSet) -> list[list[int]]:
    """Recorded output tokens of every answer."""
    return [
        answers.answer(index)[length:].tolist()
        for index, length in enumerate(answers.prompt_lens)
    ]


def _answer(
    llm: Any,  # vllm.LLM
    answers: AnswerSet,
    concurrency: int,
) -> tuple[list[Any], float]:
    """Completions of all recorded prompts, and the seconds they took together.

    An answer ends where the target ends it, or at its recorded length.
    """
    from vllm import SamplingParams

    prompts = [
        {"prompt_token_ids": answers.answer(index)[:length].tolist()}
        for index, length in enumerate(answers.prompt_lens)
    ]
    params = [
        SamplingParams(temperature=0.0, max_tokens=len(output))
        for output in _outputs(answers)
    ]
    warm_up = SamplingParams(temperature=0.0, max_tokens=_WARM_UP_TOKENS)
    llm.generate(prompts[:concurrency], warm_up, use_tqdm=False)
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    return [output.outputs[0] for output in outputs], seconds


def evaluate_served(config: EvaluateConfig) -> dict[str, dict[str, object]]:
    """`vllm-clover2 evaluate --served`: a fresh process with an engine for each tree.

    The result is also written as JSON, after every tree.
    """
    # Whatever is wrong must not cost the time to start an engine.
    for name in config.trees:
        speculative_config(config.head, name)
    _read(config)
    result: dict[str, dict[str, object]] = {}
    for name in config.trees:
        result[name] = _in_own_process(config, name)
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
            write_json(config.output, result)
    return result


def _in_own_process(config: EvaluateConfig, name: str) -> dict[str, object]:
    """`serve_tree` in a process of its own, whose end frees all that an engine has."""
    environment = dict(os.environ)
    if config.threads:
        # Else vLLM pins its threads to cores and chooses their number.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        environment["OMP_NUM_THREADS"] = str(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "result.json"
        command = [sys.executable, "-m", __name__, config.model_dump_json(), name]
        # vLLM logs to stdout, which is for the result here: all goes to stderr.
        done = subprocess.run([*command, str(answer)], env=environment, stdout=2)
        if done.returncode or not answer.exists():
            raise RuntimeError(
                f"the engine of tree {name!r} must end with a result, but its process "
                f"stopped with code {done.returncode}; its log above says why"
            )
        return json.loads(answer.read_text("utf-8"))


def _main(settings: str, name: str, answer: str) -> None:
    """The program of such a process."""
    write_json(
        Path(answer), serve_tree(EvaluateConfig.model_validate_json(settings), name)
    )


if __name__ == "__main__":
    _main(*sys.argv[1:])
