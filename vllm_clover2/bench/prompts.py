# SPDX-License-Identifier: Apache-2.0
"""The prompts of a benchmark: read, rendered by the target's chat template, checked."""

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

__all__ = ["Prompt", "read_prompts", "render", "tasks_in_turn"]


@dataclass(frozen=True)
class Prompt:
    """One request, ready to be sent."""

    task: str
    text: str  # the conversation, rendered by the chat template
    token_ids: list[int]


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Records with `messages` and `task` ("all" where the file has none)."""
    if not path.is_file():
        raise ValueError(
            f"{path} must be a file of prompts, JSON lines with `messages`, and is "
            "not there; give one with --prompts"
        )
    prompts = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = {"task": "all"} | json.loads(line)
            record["messages"][0]["content"]  # noqa: B018 - must be there
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path} must hold one JSON object with `messages` on each line, found "
                f"{line[:60]!r} in line {number}"
            ) from error
        prompts.append(record)
    if not prompts:
        raise ValueError(
            f"{path} must hold JSON objects with `messages`, found no line"
        )
    return prompts


def tasks_in_turn(
    prompts: list[dict[str, Any]], limit: int | None
) -> list[dict[str, Any]]:
    """The first of each task, the second of each, and so on, at most `limit` of each.

    Whoever takes the first of these has something of every task.
    """
    by_task: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt["task"], []).append(prompt)
    turns = zip_longest(*(own[:limit] for own in by_task.values()))
    return [prompt for turn in turns for prompt in turn if prompt is not None]


def render(prompts: list[dict[str, Any]], target: str) -> list[Prompt]:
    """Apply the target's chat template, as vLLM does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {target} must have a chat template, and has none; "
            "choose a chat model"
        )
    rendered = []
    for prompt in prompts:
        text = tokenizer.apply_chat_template(
            prompt["messages"], add_generation_prompt=True, tokenize=False
        )
        token_ids = tokenizer(text, add_special_tokens=False).input_ids
        rendered.append(Prompt(prompt["task"], str(text), token_ids))
    return rendered
