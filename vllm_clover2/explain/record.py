# SPDX-License-Identifier: Apache-2.0
"""The steps of one answer: trees as they are served, and the target's view of them.

The target writes its greedy answer in float32, a token a pass. Then the answer is
replayed as evaluation does it, with the growth of trees that serving has; and every
tree is verified in one pass over its rows, behind the text before them, which tells
what the target thinks of every node.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from vllm_clover2.train.architectures import Architecture, Replay
from vllm_clover2.train.data import Batch
from vllm_clover2.train.evaluate import Lockstep, ReplayStep, parse_tree
from vllm_clover2.train.hidden import Target
from vllm_clover2.tree import Source, TreeGrower

__all__ = ["Answer", "Node", "Step", "greedy_answer", "record_steps"]

_SOURCES = {Source.HEAD: "head", Source.CONTEXT: "text", Source.BOTH: "both"}


class Answer(NamedTuple):
    """A greedy answer and what the target needed for it."""

    tokens: list[int]  # prompt, then output
    prompt_len: int
    cache: DynamicCache  # keys and values of all tokens but the last
    prompt_seconds: float
    token_seconds: float  # of a pass over one token; the median


@dataclass(frozen=True)
class Node:
    """One drafted token."""

    token: int
    parent: int  # row number: the root is 0, the first node 1
    joint: float  # predicted probability that it is accepted
    source: str  # head, text or both
    accepted: bool
    target: float  # the target's probability of this token after its parent
    choice: int  # token that the target chooses after it


@dataclass(frozen=True)
class Step:
    """One tree, drafted and verified."""

    root: int  # number, in the output, of the token that it grew below
    nodes: list[Node]  # parents first
    path: list[int]  # accepted rows, from the root on
    choice: int  # token that the target chooses after the root
    own: int | None  # the target's own token after the path; None: the answer ended
    draft_seconds: float
    verify_seconds: float


class _TextOnly:
    """In place of a head's replay: the text is the only source."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def at(
        self, answers: torch.Tensor, roots: torch.Tensor
    ) -> tuple[None, torch.Tensor]:
        del answers
        return None, torch.zeros(len(roots), 1, device=self._device)


def _now(device: torch.device) -> float:
    """Seconds on a clock, read when the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def greedy_answer(
    target: Target,
    prompt: Sequence[int],
    max_tokens: int,
    ends: Sequence[int],  # tokens that end an answer and belong to it
) -> Answer:
    """The target's answer of at most ``max_tokens`` tokens, one pass for each."""
    device = target.lm_head.device
    tokens, cache = list(prompt), DynamicCache()
    seconds: list[float] = []
    while len(seconds) < max_tokens and (not seconds or tokens[-1] not in ends):
        started = _now(device)
        new = torch.tensor([tokens[cache.get_seq_length() :]], device=device)
        output = target.model(
            input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        tokens.append(int(output.logits[0, -1].argmax()))
        seconds.append(_now(device) - started)
    typical = statistics.median(seconds[1:] or seconds)
    return Answer(tokens, len(prompt), cache, seconds[0], typical)


@torch.inference_mode()
def record_steps(
    target: Target,
    head: tuple[Any, Architecture] | None,  # see `load_draft`; None: the text alone
    answer: Answer,
    tree: str,  # see `parse_tree`
) -> list[Step]:
    """Every step in which the output's tokens after the first are written."""
    options = parse_tree(tree)
    device = target.lm_head.device
    ids = torch.tensor(answer.tokens)
    batch = Batch(ids, torch.ones_like(ids).bool(), (len(ids),), np.zeros(1, int))
    drafts: Replay = _TextOnly(device)
    if head is not None:
        model, architecture = head
        drafts = architecture.replay(model, target, target.states(batch), batch)
    prompt_lens = torch.tensor([answer.prompt_len], device=device)
    replay = Lockstep(batch, prompt_lens, options.max_depth)
    steps = replay.steps(drafts, TreeGrower(options))
    recorded = []
    started = _now(device)
    for step in steps:
        drafted = _now(device) - started
        logits, verified = _verify(target, answer, step)
        recorded.append(_record(answer, step, logits, drafted, verified))
        started = _now(device)
    return recorded


def _verify(
    target: Target, answer: Answer, step: ReplayStep
) -> tuple[torch.Tensor, float]:
    """The target's logits [rows, V] at a tree's rows, and the seconds of that pass."""
    root, trees = int(step.roots[0]), step.trees
    device = trees.tokens.device
    tokens = trees.tokens.clone()
    tokens[0] = answer.tokens[root]
    bits = torch.arange(trees.num_rows, device=device)
    hidden = (trees.ancestors[:, None] >> bits & 1) == 0
    mask = torch.zeros(1, 1, len(bits), root + len(bits), device=device)
    mask[0, 0, :, root:].masked_fill_(hidden, torch.finfo(mask.dtype).min)
    layers: list[Any] = answer.cache.layers
    before = DynamicCache(
        (layer.keys[..., :root, :], layer.values[..., :root, :]) for layer in layers
    )
    started = _now(device)
    output = target.model(
        input_ids=tokens[None],
        attention_mask=mask,
        position_ids=(root + trees.depths.long())[None],
        past_key_values=before,
        use_cache=True,
    )
    return output.logits[0], _now(device) - started


def _record(
    answer: Answer,
    step: ReplayStep,
    logits: torch.Tensor,  # [rows, V]
    draft_seconds: float,
    verify_seconds: float,
) -> Step:
    root = int(step.roots[0])
    path = step.paths[0, : int(step.accepted[0])].tolist()
    after = answer.tokens[root + 1 :]
    choices = logits.argmax(-1).tolist()
    # On the path it is the text that counts: passes over one row and over many are
    # rounded differently.
    for row, token in zip([0, *path], after):
        choices[row] = token
    tokens, parents = step.trees.tokens[1:], step.trees.parents[1:].long()
    probabilities = logits.float().softmax(-1)[parents, tokens]
    nodes = [
        Node(token, parent, joint, _SOURCES[source], row in path, p, choices[row])
        for row, (token, parent, joint, source, p) in enumerate(
            zip(
                tokens.tolist(),
                parents.tolist(),
                step.grown.joint[0].exp().tolist(),
                map(Source, step.grown.sources[0].tolist()),
                probabilities.tolist(),
            ),
            start=1,
        )
    ]
    return Step(
        root=root - answer.prompt_len,
        nodes=nodes,
        path=path,
        choice=choices[0],
        own=after[len(path)] if len(path) < len(after) else None,
        draft_seconds=draft_seconds,
        verify_seconds=verify_seconds,
    )
