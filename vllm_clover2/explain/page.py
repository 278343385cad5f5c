# SPDX-License-Identifier: Apache-2.0
"""From a prompt to a page: one HTML file that needs nothing else."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_clover2.explain.config import ExplainConfig
from vllm_clover2.explain.record import Step, greedy_answer, record_steps
from vllm_clover2.explain.texts import TokenTexts
from vllm_clover2.heads import NO_HEAD, find_head
from vllm_clover2.records import provenance
from vllm_clover2.train.architectures import Architecture, load_draft
from vllm_clover2.train.evaluate import parse_tree
from vllm_clover2.train.hidden import Target

__all__ = ["Explanation", "explain", "explanation", "render"]

_TEMPLATE = Path(__file__).with_name("page.html")
_DATA = '"DATA"'


@dataclass(frozen=True)
class Explanation:
    """All that the page shows."""

    prompt: str
    target: str
    head: str
    tree: str
    answer: list[int]  # output tokens
    added: list[str]  # what each of them adds to the answer's text
    texts: dict[int, str]  # of all tokens of the trees and of the answer
    steps: list[Step]
    prompt_tokens: int
    prompt_seconds: float
    token_seconds: float
    made_with: dict[str, Any]


def explain(config: ExplainConfig) -> Path:
    """The `vllm-clover2 explain` command: answers the prompt and writes the page.

    Raises:
        ValueError: there is no such tree, no head for the target, or not enough room
            for prompt and answer.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    options = parse_tree(config.tree)  # a wrong name must not cost the time to load
    if config.head == NO_HEAD and not options.context:
        raise ValueError(
            f"without a head a tree must have the text as its source, found "
            f"{config.tree!r}; choose dynamic:25+context or chain:5+context"
        )
    page = render(explanation(config))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.write_text(page, "utf-8")
    return config.output


def explanation(config: ExplainConfig) -> Explanation:
    """The target's answer to the prompt, and the steps in which trees write it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    target = Target.load(config.target, torch.float32, device)
    head_name, head = _load_head(config, target)
    tokenizer = AutoTokenizer.from_pretrained(config.target)
    prompt = _prompt_tokens(tokenizer, config.prompt)
    _check_room(target, len(prompt), config.max_tokens)
    answer = greedy_answer(target, prompt, config.max_tokens, _ends(target))
    steps = record_steps(target, head, answer, config.tree)
    texts = TokenTexts(tokenizer)
    output = answer.tokens[answer.prompt_len :]
    return Explanation(
        prompt=config.prompt,
        target=_last_part(config.target),
        head=head_name,
        tree=config.tree,
        answer=output,
        added=texts.added(output),
        texts={token: texts.of(token) for token in _shown(output, steps)},
        steps=steps,
        prompt_tokens=answer.prompt_len,
        prompt_seconds=answer.prompt_seconds,
        token_seconds=answer.token_seconds,
        made_with=provenance(),
    )


def render(content: Explanation) -> str:
    """The page; whatever texts hold is data in it, never markup."""
    data = json.dumps(asdict(content))
    # Inside <script> only these can end or change it; they occur in strings alone.
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _TEMPLATE.read_text("utf-8").replace(_DATA, data)


def _load_head(
    config: ExplainConfig, target: Target
) -> tuple[str, tuple[Any, Architecture] | None]:
    if config.head == NO_HEAD:
        return NO_HEAD, None
    if config.head is None:
        folder = find_head(config.target, target.config)
    else:
        folder = Path(config.head)
    return folder.name, load_draft(folder, torch.float32, target)


def _prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """As a user's message by the chat template; without one the text as it is."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _check_room(target: Target, prompt_len: int, max_tokens: int) -> None:
    # A tree's pass has one mask for all layers, so windows must not be reached either.
    limits = (
        getattr(target.config, name, None)
        for name in ("max_position_embeddings", "sliding_window")
    )
    room = min(limit for limit in limits if limit)
    if prompt_len + max_tokens > room:
        raise ValueError(
            f"prompt and answer must fit into the target's {room} tokens, found "
            f"{prompt_len} + {max_tokens}; shorten the prompt or lower max_tokens"
        )


def _ends(target: Target) -> list[int]:
    generation: Any = target.model.generation_config
    ends = generation.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _shown(output: list[int], steps: list[Step]) -> list[int]:
    shown = set(output)
    for step in steps:
        shown |= {step.choice}
        shown |= {token for node in step.nodes for token in (node.token, node.choice)}
    return sorted(shown)


def _last_part(target: str) -> str:
    return target.rstrip("/").rsplit("/", 1)[-1]
