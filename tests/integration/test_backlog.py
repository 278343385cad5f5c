# SPDX-License-Identifier: Apache-2.0
"""Which committed rows wait for their draft KV, and who lacks some for good."""

from collections import Counter

import numpy as np
import pytest
import torch

from vllm_clover2.integration.backlog import CommittedRows, HiddenBacklog

BLOCK = 4
TABLE = np.arange(1, 61, dtype=np.int32).reshape(3, 20)


def rows_of(*spans: tuple[int, int]) -> CommittedRows:
    """Rows of requests 0, 1, ...: positions from first to before end."""
    positions = np.concatenate([np.arange(*span) for span in spans])
    counts = np.array([end - first for first, end in spans], dtype=np.int32)
    requests = np.repeat(np.arange(len(spans)), counts)
    hidden = torch.from_numpy(100.0 * requests + positions)[:, None]
    return CommittedRows(hidden, requests, positions, counts, positions + 1000)


def test_rows_of_several_steps_come_out_together() -> None:
    backlog = HiddenBacklog(100, BLOCK, Counter())
    backlog.add(["a", "b"], rows_of((0, 5), (0, 3)), TABLE)
    backlog.add(["a", "b"], rows_of((5, 6), (3, 7)), TABLE)
    assert backlog.sizes(["a", "b"]).tolist() == [6, 7]
    rows = backlog.take(["b"], [1], TABLE)
    assert rows.positions.tolist() == list(range(7))
    assert rows.requests.tolist() == [1] * 7
    assert rows.counts.tolist() == [7]
    assert rows.next_tokens.tolist() == list(range(1000, 1007))
    assert rows.hidden[:, 0].tolist() == [100.0 + n for n in range(7)]
    assert backlog.sizes(["a", "b"]).tolist() == [6, 0]


def test_hidden_states_are_copies() -> None:
    """A step's buffer is written again in the next step."""
    backlog = HiddenBacklog(100, BLOCK, Counter())
    rows = rows_of((0, 3))
    backlog.add(["a"], rows, TABLE)
    rows.hidden.zero_()
    assert backlog.take(["a"], [0], TABLE).hidden[:, 0].tolist() == [0.0, 1.0, 2.0]


def test_beyond_its_bounds_the_longest_is_given_up() -> None:
    backlog = HiddenBacklog(10, BLOCK, Counter())
    backlog.add(["a", "b"], rows_of((0, 6), (0, 4)), TABLE)
    assert backlog.sizes(["a", "b"]).tolist() == [6, 4]
    backlog.add(["a", "b"], rows_of((6, 7), (4, 5)), TABLE)
    assert backlog.sizes(["a", "b"]).tolist() == [-1, 5]
    backlog.add(["a", "b"], rows_of((7, 8), (5, 6)), TABLE)
    assert backlog.sizes(["a", "b"]).tolist() == [-1, 6]
    assert backlog.given_up.total() == 1


@pytest.mark.parametrize(("written", "waiting"), [(True, 3), (False, -1)])
def test_a_cached_prefix_must_have_draft_kv(written: bool, waiting: int) -> None:
    """A request whose prompt was cached starts behind it."""
    backlog = HiddenBacklog(100, BLOCK, Counter())
    backlog.add(["a"], rows_of((0, 9)), TABLE)
    if written:
        backlog.take(["a"], [0], TABLE)
    backlog.drop("a")
    backlog.add(["b"], rows_of((8, 11)), TABLE)
    assert backlog.sizes(["b"]).tolist() == [waiting]


def test_a_block_that_is_written_anew_lacks_draft_kv_again() -> None:
    """Blocks are freed and given to others; nothing says so but new rows in them."""
    backlog = HiddenBacklog(100, BLOCK, Counter())
    backlog.add(["a"], rows_of((0, 8)), TABLE)
    backlog.take(["a"], [0], TABLE)
    backlog.add(["thief"], rows_of((0, 3)), TABLE)  # the same blocks
    backlog.add(["b"], rows_of((8, 9)), TABLE)
    assert backlog.sizes(["b"]).tolist() == [-1]


def test_a_block_counts_once_it_is_full() -> None:
    backlog = HiddenBacklog(100, BLOCK, Counter())
    for first, end in ((0, 3), (3, 6), (6, 9)):
        backlog.add(["a"], rows_of((first, end)), TABLE)
        backlog.take(["a"], [0], TABLE)
    backlog.drop("a")
    backlog.add(["b"], rows_of((8, 9)), TABLE)
    assert backlog.sizes(["b"]).tolist() == [1]
    backlog.add(["c"], rows_of((12, 13)), TABLE)
    assert backlog.sizes(["c"]).tolist() == [-1]


def test_a_preempted_request_starts_again() -> None:
    backlog = HiddenBacklog(100, BLOCK, Counter())
    backlog.add(["a"], rows_of((0, 6)), TABLE)
    backlog.add(["a"], rows_of((0, 7)), TABLE)
    assert backlog.sizes(["a"]).tolist() == [7]


@pytest.mark.parametrize("most", [1, 3, 5, 100])
def test_a_split_keeps_all_rows_in_order(most: int) -> None:
    rows = rows_of((0, 5), (3, 4), (2, 9))
    parts = rows.split(most)
    assert all(len(part.positions) <= most for part in parts)
    for name in ("requests", "positions", "next_tokens"):
        whole = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(whole, getattr(rows, name))
    for part in parts:
        assert part.counts.sum() == len(part.positions)
        firsts = part.requests[part.offsets[:-1]]
        assert np.array_equal(np.repeat(firsts, part.counts), part.requests)
