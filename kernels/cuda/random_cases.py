# SPDX-License-Identifier: Apache-2.0
"""Random inputs of the ops in the strided layout, for check.py and for the tests."""

from dataclasses import dataclass

import torch

POISON = float("nan")


@dataclass(frozen=True)
class AttentionCase:
    """The tensor arguments of tree_attention."""

    query: torch.Tensor  # [tokens, heads, D]
    kv_cache: torch.Tensor  # [blocks, kv_heads, block_size, 2 * D]
    block_table: torch.Tensor  # [R, max_blocks] int32
    prefix_lens: torch.Tensor  # [R] int32
    query_starts: torch.Tensor  # [R] int32
    row_offsets: torch.Tensor  # [R + 1] int32
    ancestors: torch.Tensor  # [rows] int64
    out: torch.Tensor  # [tokens, heads, D]

    def to(self, device: str) -> "AttentionCase":
        """The same case on a device."""
        return AttentionCase(*(tensor.to(device) for tensor in vars(self).values()))


def random_parents(
    rows: int, generator: torch.Generator, chain: bool = False
) -> list[int]:
    """Parents of a random tree: every row hangs below some earlier row."""
    if chain:
        return list(range(-1, rows - 1))
    return [
        -1 if row == 0 else int(torch.randint(row, (), generator=generator))
        for row in range(rows)
    ]


def ancestor_words(parents: list[int]) -> list[int]:
    """Ancestor-or-self words as signed 64-bit integers."""
    words: list[int] = []
    for row, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << row)
    return [word - (1 << 64) if word >> 63 else word for word in words]


def scattered_blocks(
    prefixes: list[int],
    rows: list[int],
    block_size: int,
    spare_columns: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, int]:
    """A block table [R, max_blocks] with blocks in random order, and their number."""
    needed = [
        -(-(prefix + count) // block_size)
        for prefix, count in zip(prefixes, rows, strict=True)
    ]
    num_blocks = sum(needed) + 3
    free = torch.randperm(num_blocks, generator=generator).int().tolist()
    width = max([*needed, 1]) + spare_columns
    table = torch.full((len(prefixes), width), num_blocks - 1, dtype=torch.int32)
    for request, count in enumerate(needed):
        table[request, :count] = torch.tensor(
            [free.pop() for _ in range(count)], dtype=torch.int32
        )
    return table, num_blocks


def attention_case(
    prefixes: list[int],
    rows: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spare_columns: int = 0,
    slots_first: bool = False,
    chain: bool = False,
) -> AttentionCase:
    """Random trees over random prefixes; everything that must not be read is NaN.

    Each request's rows lie in ``query`` after one row that belongs to no tree.
    ``slots_first`` lays the cache out as [blocks, block_size, kv_heads, 2 * D].
    """
    generator = torch.Generator().manual_seed(seed)
    table, num_blocks = scattered_blocks(
        prefixes, rows, block_size, spare_columns, generator
    )
    shape = (num_blocks, kv_heads, block_size, 2 * dim)
    if slots_first:
        shape = (num_blocks, block_size, kv_heads, 2 * dim)
    cache = torch.full(shape, POISON, dtype=dtype)
    if slots_first:
        cache = cache.transpose(1, 2)
    words: list[int] = []
    starts: list[int] = []
    tokens = 0
    for request, (prefix, count) in enumerate(zip(prefixes, rows, strict=True)):
        keys = torch.arange(prefix + count)
        slots = (table[request].long()[keys // block_size], keys % block_size)
        values = torch.randn(len(keys), kv_heads, 2 * dim, generator=generator)
        cache[slots[0], :, slots[1]] = values.to(dtype)
        words += ancestor_words(random_parents(count, generator, chain))
        starts.append(tokens + 1)
        tokens += 1 + count
    # Spread, so that softmax is neither flat nor one key alone.
    query = 2 * torch.randn(tokens, heads, dim, generator=generator)
    offsets = torch.tensor([0, *rows]).cumsum(0).int()
    return AttentionCase(
        query.to(dtype),
        cache,
        table,
        torch.tensor(prefixes, dtype=torch.int32),
        torch.tensor(starts, dtype=torch.int32),
        offsets,
        torch.tensor(words, dtype=torch.int64),
        torch.full((tokens, heads, dim), -7.0, dtype=dtype),
    )


@dataclass(frozen=True)
class AcceptCase:
    """The tensor arguments of tree_accept."""

    target_tokens: torch.Tensor  # [rows] int64
    draft_tokens: torch.Tensor  # [rows] int64
    parents: torch.Tensor  # [rows] int32
    row_offsets: torch.Tensor  # [R + 1] int32

    def to(self, device: str) -> "AcceptCase":
        """The same case on a device."""
        return AcceptCase(*(tensor.to(device) for tensor in vars(self).values()))


def accept_case(
    rows: list[int], vocabulary: int, seed: int = 0, chain: bool = False
) -> AcceptCase:
    """Random trees whose few tokens make long paths and duplicate siblings."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(rows)
    parents = [
        parent for count in rows for parent in random_parents(count, generator, chain)
    ]
    return AcceptCase(
        torch.randint(vocabulary, (total,), generator=generator),
        torch.randint(vocabulary, (total,), generator=generator),
        torch.tensor(parents, dtype=torch.int32),
        torch.tensor([0, *rows]).cumsum(0).int(),
    )


@dataclass(frozen=True)
class CommitCase:
    """The tensor arguments of commit_kv."""

    kv_caches: list[torch.Tensor]  # each [blocks, kv_heads, block_size, 2 * D]
    block_table: torch.Tensor  # [R, max_blocks] int32
    prefix_lens: torch.Tensor  # [R] int32
    paths: torch.Tensor  # [R, max_depth] int32
    lengths: torch.Tensor  # [R] int32

    def to(self, device: str) -> "CommitCase":
        """The same case on a device, its caches copied."""
        rest = list(vars(self).values())[1:]
        # clone keeps strides, also those of a transposed cache.
        caches = [cache.to(device).clone() for cache in self.kv_caches]
        return CommitCase(caches, *(tensor.to(device) for tensor in rest))


def commit_case(
    prefixes: list[int],
    lengths: list[int],
    layers: int = 2,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    max_depth: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    slots_first: bool = False,
) -> CommitCase:
    """Random increasing paths through trees of 64 rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [64] * len(prefixes)
    table, num_blocks = scattered_blocks(prefixes, rows, block_size, 0, generator)
    shape = (num_blocks, kv_heads, block_size, 2 * dim)
    if slots_first:
        shape = (num_blocks, block_size, kv_heads, 2 * dim)
    caches = [torch.randn(shape, generator=generator).to(dtype) for _ in range(layers)]
    if slots_first:
        caches = [cache.transpose(1, 2) for cache in caches]
    paths = torch.full(
        (len(prefixes), max([max_depth, 1, *lengths])), -1, dtype=torch.int32
    )
    for request, length in enumerate(lengths):
        chosen = torch.randperm(63, generator=generator)[:length] + 1
        paths[request, :length] = chosen.sort().values.int()
    return CommitCase(
        caches,
        table,
        torch.tensor(prefixes, dtype=torch.int32),
        paths,
        torch.tensor(lengths, dtype=torch.int32),
    )


@dataclass(frozen=True)
class ContextCase:
    """The tensor arguments of context_nodes."""

    history: torch.Tensor  # [slots, width] int32
    requests: torch.Tensor  # [R] int32
    lengths: torch.Tensor  # [R] int32

    def to(self, device: str) -> "ContextCase":
        """The same case on a device, its history in a wider tensor."""
        slots, width = self.history.shape
        wide = self.history.new_zeros(slots, width + 3, device=device)
        wide[:, 2:-1] = self.history
        return ContextCase(
            wide[:, 2:-1], self.requests.to(device), self.lengths.to(device)
        )


def context_case(
    lengths: list[int], vocabulary: int, seed: int = 0, copied: int = 0
) -> ContextCase:
    """Random texts in shuffled rows, one row more than there are requests.

    Over the rest of each text its last 8 tokens are copied ``copied`` times, cut off
    at random, so that few places match long in texts of many different tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    slots, width = len(lengths) + 1, max([*lengths, 1]) + 5
    history = torch.randint(
        vocabulary, (slots, width), generator=generator, dtype=torch.int32
    )
    requests = torch.randperm(slots, generator=generator)[: len(lengths)]
    for slot, length in zip(requests.tolist(), lengths, strict=True):
        suffix = history[slot, max(0, length - 8) : length].clone()
        for _ in range(copied if length > 16 else 0):
            first = int(torch.randint(8, (), generator=generator))
            start = int(torch.randint(length - 16, (), generator=generator))
            history[slot, start : start + 8 - first] = suffix[first:]
    return ContextCase(
        history, requests.int(), torch.tensor(lengths, dtype=torch.int32)
    )
