# SPDX-License-Identifier: Apache-2.0
"""Places in recorded texts from which the target can go on otherwise.

A prompt gives one greedy answer; the places in it and in its answers give many texts,
whose first part vLLM's prefix cache computes once. (Arctic's training data are made
like this: prefixes of public texts that the target continues.)
"""

import os.path
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_clover2.train.data import AnswerSet, read_answers

__all__ = ["starts_in"]

# Texts that share so many tokens in a row, about eight words, are of one origin.
_SHARED_TOKENS = 12
# The shortest prefix: a chat template's opening and a few words.
_SHORTEST = 32


def starts_in(
    path: Path,  # answers file
    vocab_size: int,
    starts: int,  # places in each text
    longest: int,  # tokens before a place
    temperatures: Sequence[float],
    exclude: Sequence[Path],  # answers files whose prompts must not be trained on
    seed: int,
) -> tuple[list[dict[str, Any]], int]:
    """What `generate` asks for, and how many texts `exclude` left out.

    Each start has an `id` (ORIGIN's id@number of tokens), the `origin` that a
    validation set goes by, `task`, `prompt_token_ids` and the `temperatures` it may
    have: a greedy answer is not continued greedily, which would repeat it.

    Raises:
        ValueError: a file is damaged, its ids are not unique, all temperatures are 0,
            or nothing is left.
    """
    if max(temperatures) <= 0:
        raise ValueError(
            "continue_from needs a temperature above 0: a greedy answer that goes on "
            f"greedily is itself, found temperatures {list(temperatures)}"
        )
    answers = read_answers(path, vocab_size)
    if len(set(answers.ids)) != len(answers):
        raise ValueError(f"the ids in {path} must be unique")
    kept = _allowed(answers, [read_answers(other, vocab_size) for other in exclude])
    found = [
        start
        for index in kept
        for start in _starts(answers, index, starts, longest, temperatures, seed)
    ]
    if not found:
        raise ValueError(
            f"none of the {len(answers)} texts of {path} can be continued: "
            f"{len(answers) - len(kept)} are repeated or share {_SHARED_TOKENS} tokens "
            f"in a row with a prompt of exclude, the others have {_SHORTEST} tokens or "
            "fewer"
        )
    return found, len(answers) - len(kept)


def _starts(
    answers: AnswerSet,
    index: int,
    starts: int,
    longest: int,
    temperatures: Sequence[float],
    seed: int,
) -> list[dict[str, Any]]:
    """The starts in one text: always the same ones, so that resuming is exact."""
    name, tokens = answers.ids[index], answers.answer(index)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    places = np.arange(_SHORTEST, min(len(tokens), longest + 1))
    chosen = generator.permutation(places)[:starts]
    greedy = answers.temperatures[index] == 0
    sampled = [one for one in temperatures if one > 0]
    return [
        {
            "id": f"{name}@{place}",
            "origin": answers.origins[index],
            "task": answers.tasks[index],
            "prompt_token_ids": tokens[:place].tolist(),
            "temperatures": (
                sampled
                if greedy and place >= answers.prompt_lens[index]
                else list(temperatures)
            ),
        }
        for place in sorted(chosen.tolist())
    ]


def _allowed(answers: AnswerSet, excluded: list[AnswerSet]) -> list[int]:
    """Numbers of the texts that are new and have nothing of the excluded prompts."""
    prompts = [prompt for one in excluded for prompt in _prompts(one)]
    # The chat template's beginning, which all prompts share, says nothing.
    opening = len(os.path.commonprefix(prompts + _prompts(answers))) if prompts else 0
    forbidden = {window for one in prompts for window in _windows(one[opening:])}
    kept, seen = [], set()
    for index in range(len(answers)):
        tokens = answers.answer(index).tolist()
        text = tuple(tokens)
        if text not in seen and forbidden.isdisjoint(_windows(tokens[opening:])):
            kept.append(index)
        seen.add(text)
    return kept


def _prompts(answers: AnswerSet) -> list[list[int]]:
    return [
        answers.answer(index)[: answers.prompt_lens[index]].tolist()
        for index in range(len(answers))
    ]


def _windows(tokens: list[int]) -> set[tuple[int, ...]]:
    """All runs of `_SHARED_TOKENS` tokens."""
    count = len(tokens) - _SHARED_TOKENS + 1
    return {tuple(tokens[at : at + _SHARED_TOKENS]) for at in range(count)}
