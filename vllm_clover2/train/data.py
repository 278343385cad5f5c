# SPDX-License-Identifier: Apache-2.0
"""Recorded answers of a target model, as token ids, and batches of them.

An answers file holds one JSON object a line (optionally gzipped):
`id`, `task`, `temperature`, `finish_reason`, `prompt_token_ids` (chat template
applied, generation prompt included) and `output_token_ids`; a text that continues
another one has that one's id as `origin`.  Training and
evaluation work on these ids alone; no tokenizer is needed.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = [
    "AnswerSet",
    "Batch",
    "next_in_text",
    "pack",
    "read_answers",
    "token_budget_batches",
]

# Answers are read in windows of this many batches, each sorted by length: long enough
# that padding the target's pass stays under 3 %, short enough for a random order.
_SORT_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class AnswerSet:
    """Answers as one flat token array; answer i is `tokens[starts[i]:starts[i+1]]`."""

    tokens: np.ndarray  # [total] int32, prompt then output of every answer
    starts: np.ndarray  # [answers + 1] int64
    prompt_lens: np.ndarray  # [answers] int64
    ids: list[str]
    origins: list[str]  # ids of the texts they continue, or their own
    tasks: list[str]
    temperatures: np.ndarray  # [answers] float64 that they were sampled at, or NaN
    fingerprint: str  # sha256 of the token ids and lengths

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> np.ndarray:
        """[answers] int64 tokens per answer, prompt included."""
        return np.diff(self.starts)

    def answer(self, index: int) -> np.ndarray:
        """[length] int32 token ids of one answer, prompt included."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the training and of the validation answers.

        The split hashes the answer's id, so it stays the same when answers are
        appended, reordered or dropped; a text goes where the one that it continues is.
        """
        hashes = [zlib.crc32(name.encode()) for name in self.origins]
        buckets = np.array(hashes) % 10_000
        held_out = buckets < validation_fraction * 10_000
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def select(
        self, max_answers: int | None, temperatures: list[float] | None
    ) -> np.ndarray:
        """Indices of the first answers of the file that have these temperatures."""
        chosen = np.arange(len(self))[:max_answers]
        if temperatures is None:
            return chosen
        kept = chosen[np.isin(self.temperatures[chosen], temperatures)]
        if not len(kept):
            found = sorted(set(self.temperatures[chosen].tolist()))
            raise ValueError(
                f"no answer was sampled at a temperature of {temperatures}; the file "
                f"has {found[:8]}"
            )
        return kept

    def output_counts(self, vocab_size: int, indices: np.ndarray) -> np.ndarray:
        """[vocab_size] int64: how often each id occurs in the outputs of `indices`."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for index in indices:
            output = self.answer(index)[self.prompt_lens[index] :]
            counts += np.bincount(output, minlength=vocab_size)
        return counts


@dataclass(frozen=True)
class Batch:
    """Answers packed one behind the other, without padding."""

    input_ids: torch.Tensor  # [N] int64
    loss_mask: torch.Tensor  # [N] bool, see `pack`
    lengths: tuple[int, ...]  # of the B answers, sum N
    indices: np.ndarray  # [B] answers' numbers in their AnswerSet

    @property
    def starts(self) -> torch.Tensor:
        """[B] int64: where each answer begins."""
        return torch.tensor((0, *self.lengths[:-1])).cumsum(0)


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); copy or generate the answers again"
        ) from error


def read_answers(
    path: Path, vocab_size: int, max_length: int = 4096, limit: int | None = None
) -> AnswerSet:
    """Read an answers file; answers longer than `max_length` are cut at the end.

    Raises ValueError for damaged files and for token ids that the target's
    vocabulary does not have.
    """
    pieces: list[np.ndarray] = []
    prompt_lens: list[int] = []
    ids: list[str] = []
    origins: list[str] = []
    tasks: list[str] = []
    temperatures: list[float] = []
    for number, line in enumerate(_lines(path), start=1):
        if limit is not None and len(ids) >= limit:
            break
        try:
            record = json.loads(line)
            prompt, output = record["prompt_token_ids"], record["output_token_ids"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with prompt_token_ids "
                f"and output_token_ids, got {line[:60]!r} ({error!r})"
            ) from error
        if len(prompt) >= max_length - 1 or not prompt or not output:
            continue  # nothing of the answer would be left to learn from
        pieces.append(np.asarray((prompt + output)[:max_length], dtype=np.int32))
        prompt_lens.append(len(prompt))
        ids.append(str(record.get("id", number)))
        origins.append(str(record.get("origin", ids[-1])))
        tasks.append(str(record.get("task", "")))
        temperatures.append(float(record.get("temperature", "nan")))
    if not pieces:
        raise ValueError(f"{path} holds no usable answer")
    tokens = np.concatenate(pieces)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(
            f"token ids of {path} must lie in the target's vocabulary [0, {vocab_size})"
            f", found {tokens.min()}..{tokens.max()}; use the answers of this target"
        )
    starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
    return AnswerSet(
        tokens,
        starts,
        np.array(prompt_lens),
        ids,
        origins,
        tasks,
        np.array(temperatures),
        digest,
    )


def token_budget_batches(
    lengths: np.ndarray,  # [answers] int64
    indices: np.ndarray,  # answers to use
    max_tokens: int,
    seed: int | None,
) -> list[np.ndarray]:
    """Group `indices` into batches of at most `max_tokens` tokens.

    A longer answer is a batch of its own. Answers of similar length go together: the
    target's pass pads them. The same arguments give the same batches, which is what
    makes resuming inside an epoch exact; `seed` None keeps a fixed, length-sorted
    order (validation).
    """
    if seed is None:
        order = indices[np.argsort(lengths[indices], kind="stable")]
        return _cut(lengths, order, max_tokens)
    generator = np.random.default_rng(seed)
    order = generator.permutation(indices)
    mean = max(1.0, float(lengths[indices].mean()))
    window = max(1, int(_SORT_WINDOW_BATCHES * max_tokens / mean))
    batches: list[np.ndarray] = []
    for start in range(0, len(order), window):
        chunk = order[start : start + window]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        cut = _cut(lengths, chunk, max_tokens)
        batches.extend(cut[number] for number in generator.permutation(len(cut)))
    return batches


def _cut(lengths: np.ndarray, order: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Cut `order` into runs of at most `max_tokens` tokens."""
    batches: list[np.ndarray] = []
    first = tokens = 0
    for position, length in enumerate(lengths[order]):
        if position > first and tokens + length > max_tokens:
            batches.append(order[first:position])
            first, tokens = position, 0
        tokens += length
    return [*batches, order[first:]] if len(order) else []


def pack(answers: AnswerSet, indices: np.ndarray, learn_prompts: bool = False) -> Batch:
    """The answers `indices`, one behind the other.

    `loss_mask` covers the output tokens and the last prompt token: the draft's very
    first step of a request starts from that token's hidden state. It leaves out each
    answer's last token, which has no successor whose state could be imitated. With
    `learn_prompts` it covers the whole prompts too.
    """
    tokens = np.concatenate([answers.answer(index) for index in indices])
    masks = []
    for index in indices:
        mask = np.zeros(answers.lengths[index], dtype=bool)
        first = 0 if learn_prompts else answers.prompt_lens[index] - 1
        mask[first:-1] = True
        masks.append(mask)
    return Batch(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(np.concatenate(masks)),
        tuple(answers.lengths[indices].tolist()),
        indices,
    )


def next_in_text(
    values: torch.Tensor,  # [N, ...] of packed texts
    lengths: tuple[int, ...],
) -> torch.Tensor:
    """[N, ...]: each position's successor, 0 at the end of every text."""
    shifted = torch.zeros_like(values)
    shifted[:-1] = values[1:]
    shifted[torch.tensor(lengths, device=values.device).cumsum(0) - 1] = 0
    return shifted
