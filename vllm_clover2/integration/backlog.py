# SPDX-License-Identifier: Apache-2.0
"""Committed rows whose draft KV is not written yet.

Where the head is not asked, its augmenting block need not run. The target's hidden
states of such rows wait here, and when the head is asked for a request again they are
made up for in one batched pass: the draft's KV is then what it would have been.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True)
class CommittedRows:
    """Rows of target passes that are part of the text now, by request.

    A request's rows are consecutive positions.
    """

    hidden: torch.Tensor  # [n, hidden] the target's states of the rows
    requests: np.ndarray  # [n] int64 batch index of each row's request
    positions: np.ndarray  # [n] int64, also the KV position
    counts: np.ndarray  # [num_reqs] int32 rows of each request, at least 1
    next_tokens: np.ndarray  # [n] int64 token that follows each row

    @property
    def offsets(self) -> np.ndarray:
        """[num_reqs + 1] int64 first row of each request, and the end."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    def split(self, max_rows: int) -> "list[CommittedRows]":
        """The rows in order, in parts of at most ``max_rows``."""
        total = len(self.positions)
        if total <= max_rows:
            return [self]
        parts = []
        for first in range(0, total, max_rows):
            part = slice(first, first + max_rows)
            requests = self.requests[part]
            starts = np.flatnonzero(np.diff(requests, prepend=-1))
            counts = np.diff(starts, append=len(requests)).astype(np.int32)
            parts.append(
                CommittedRows(
                    self.hidden[part],
                    requests,
                    self.positions[part],
                    counts,
                    self.next_tokens[part],
                )
            )
        return parts


@dataclass
class _Waiting:
    """Rows of one request, in chunks of consecutive positions."""

    end: int  # position after the last row
    missing: bool  # KV before the waiting rows is missing, for good
    count: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    next_tokens: list[np.ndarray] = field(default_factory=list)

    def clear(self) -> None:
        self.count = 0
        self.hidden, self.positions, self.next_tokens = [], [], []


class HiddenBacklog:
    """The waiting rows of all requests, at most ``max_rows``.

    ``complete`` tells which KV blocks hold the draft's KV of all their positions, so
    that a request whose prompt was found in the prefix cache knows whether the draft
    can attend to it. A request that cannot is not drafted for by the head.
    """

    def __init__(self, max_rows: int, block_size: int, given_up: Counter[str]) -> None:
        self._max_rows = max_rows
        self._block_size = block_size
        self._waiting: dict[str, _Waiting] = {}
        self._complete: set[int] = set()
        self.given_up = given_up  # requests, by reason

    def add(
        self,
        requests: Sequence[str],  # [num_reqs] ids
        rows: CommittedRows,
        block_table: np.ndarray,  # [num_reqs, max_blocks] int32
    ) -> None:
        """Rows that the last step committed."""
        offsets = rows.offsets
        for index, request in enumerate(requests):
            part = slice(offsets[index], offsets[index + 1])
            positions = rows.positions[part]
            first, end = int(positions[0]), int(positions[-1]) + 1
            waiting = self._waiting.get(request)
            if waiting is None or waiting.end != first:
                # New, or preempted and started again; what is before it came from
                # the prefix cache.
                cached = block_table[index, : -(-first // self._block_size)]
                missing = not self._complete.issuperset(cached.tolist())
                if missing:
                    self.given_up["cached prefix without draft KV: no head"] += 1
                waiting = self._waiting[request] = _Waiting(first, missing)
            touched = block_table[
                index, first // self._block_size : -(-end // self._block_size)
            ]
            self._complete.difference_update(touched.tolist())
            waiting.end = end
            if waiting.missing:
                continue
            waiting.count += end - first
            # A copy: a view would keep the whole step's states alive.
            waiting.hidden.append(rows.hidden[part].clone())
            waiting.positions.append(positions)
            waiting.next_tokens.append(rows.next_tokens[part])
        self._give_up_the_longest()

    def _give_up_the_longest(self) -> None:
        while sum(one.count for one in self._waiting.values()) > self._max_rows:
            longest = max(self._waiting.values(), key=lambda one: one.count)
            longest.clear()
            longest.missing = True
            self.given_up["waited too long for draft KV: no head"] += 1

    def sizes(self, requests: Sequence[str]) -> np.ndarray:
        """Rows that wait [n] int64; -1 where the draft's KV cannot be made up for."""
        waiting = (self._waiting[request] for request in requests)
        return np.array([-1 if one.missing else one.count for one in waiting])

    def take(
        self,
        requests: Sequence[str],  # ids, none of size -1
        indices: Sequence[int],  # their batch indices
        block_table: np.ndarray,  # [num_reqs, max_blocks] int32
    ) -> CommittedRows:
        """The waiting rows of these requests, which the caller writes KV for now."""
        parts = [self._waiting[request] for request in requests]
        counts = np.array([part.count for part in parts], dtype=np.int32)
        rows = CommittedRows(
            torch.cat([chunk for part in parts for chunk in part.hidden]),
            np.repeat(np.asarray(indices, dtype=np.int64), counts),
            np.concatenate([chunk for part in parts for chunk in part.positions]),
            counts,
            np.concatenate([chunk for part in parts for chunk in part.next_tokens]),
        )
        for part, index in zip(parts, indices, strict=True):
            # The last block is complete only when it is full.
            whole = part.end // self._block_size
            first = (part.end - part.count) // self._block_size
            self._complete.update(block_table[index, first:whole].tolist())
            part.clear()
        return rows

    def drop(self, request: str) -> None:
        """Forget the request, if it is known."""
        self._waiting.pop(request, None)
