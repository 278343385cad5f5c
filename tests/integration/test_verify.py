# SPDX-License-Identifier: Apache-2.0
"""What a step verifies: drafts found again, laid out, and reasons counted."""

from collections import Counter

import numpy as np
import pytest
import torch

from vllm_clover2.integration.verify import (
    Draft,
    DraftStore,
    VerifyBatch,
    likeliest_path,
)

#        root
#       /    \
#    1: 7    2: 8          rows, and their tokens
#    /  \       \
# 3: 5  4: 9   5: 5
TOKENS = [7, 8, 5, 9, 5]
PARENTS = np.array([0, 0, 1, 1, 2], dtype=np.int32)
SOURCES = np.array([0, 1, 2, 1, 0], dtype=np.int8)
TREE = Draft(10, TOKENS, PARENTS, SOURCES, is_chain=False)


@pytest.fixture
def store() -> DraftStore:
    store = DraftStore(Counter())
    store.put("a", TREE)
    return store


def test_a_draft_is_found_whole(store: DraftStore) -> None:
    draft = store.scheduled("a", 10, TOKENS)
    assert (draft.tokens, draft.is_chain) == (TOKENS, False)
    assert draft.parents.tolist() == PARENTS.tolist()
    assert draft.sources.tolist() == SOURCES.tolist()
    assert not store.counts


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_trimmed_draft_is_the_tree_of_its_first_nodes(
    store: DraftStore, size: int
) -> None:
    draft = store.scheduled("a", 10, TOKENS[:size])
    assert draft.tokens == TOKENS[:size]
    assert draft.parents.tolist() == PARENTS[:size].tolist()
    assert draft.sources.tolist() == SOURCES[:size].tolist()
    assert not draft.is_chain
    assert store.counts == {"trimmed by the scheduler": 1}


@pytest.mark.parametrize(
    ("request_id", "num_tokens", "tokens", "reason"),
    [
        ("a", 11, TOKENS, "unknown draft"),  # the text has moved on
        ("a", 10, [7, 8, 6], "unknown draft"),
        ("a", 10, [*TOKENS, 4], "unknown draft"),
        ("b", 10, TOKENS, "unknown draft"),
        ("a", 10, [-1, -1], "placeholder draft"),
    ],
    ids=["moved-on", "other-tokens", "longer", "other-request", "placeholders"],
)
def test_anything_else_is_read_as_a_chain(
    store: DraftStore, request_id: str, num_tokens: int, tokens: list[int], reason: str
) -> None:
    draft = store.scheduled(request_id, num_tokens, tokens)
    assert draft.tokens == tokens
    assert draft.parents.tolist() == list(range(len(tokens)))
    assert len(draft.sources) == len(tokens)
    assert draft.is_chain
    assert store.counts == {reason: 1}


def test_a_dropped_draft_is_unknown(store: DraftStore) -> None:
    store.drop("a")
    store.drop("never seen")
    assert store.scheduled("a", 10, TOKENS).is_chain


def test_likeliest_path_takes_first_children() -> None:
    assert likeliest_path(PARENTS) == [1, 3]
    assert likeliest_path(np.arange(4)) == [1, 2, 3, 4]
    assert likeliest_path(np.zeros(3, dtype=np.int32)) == [1]
    assert likeliest_path(np.array([], dtype=np.int32)) == []


def test_layout_of_prompts_chains_and_trees_in_one_step() -> None:
    """A chunk of a prompt, a tree, a chain, and a request without a draft."""
    links, sources = np.arange(2, dtype=np.int32), np.ones(2, dtype=np.int8)
    chain = Draft(32, [3, 4], links, sources, is_chain=True)
    batch = VerifyBatch.build(
        [None, TREE, chain, None],
        num_computed=np.array([0, 20, 31, 8]),
        num_scheduled=np.array([16, 6, 3, 1]),
    )
    assert batch.row_counts.tolist() == [1, 6, 3, 1]
    assert batch.root_positions.tolist() == [15, 20, 31, 8]
    assert batch.root_query_rows.tolist() == [15, 16, 22, 25]
    assert batch.tree_requests.tolist() == [1]
    assert batch.sources.tolist() == [-1, -1, *SOURCES, -1, 1, 1, -1]
    assert batch.ranks.tolist() == [1, 1, 1, 2, 1, 2, 1, 1, 1, 1, 1]
    assert batch.max_depth == 2
    assert batch.query_rows == 26
    positions = [15, 20, 21, 21, 22, 22, 22, 31, 32, 33, 8]
    assert batch.positions().tolist() == positions

    rows = batch.tree_rows()
    assert rows is not None
    block_table = torch.arange(8, dtype=torch.int32).view(4, 2)
    assert rows.of(block_table).tolist() == [[2, 3]]
    assert rows.prefix_lens.tolist() == [20]
    assert rows.query_starts.tolist() == [16]
    assert rows.row_offsets.tolist() == [0, 6]
    assert rows.ancestors.tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101]
    assert not rows.covers_batch


def test_only_trees() -> None:
    batch = VerifyBatch.build([TREE] * 2, np.array([5, 9]), np.array([6, 6]))
    rows = batch.tree_rows()
    assert rows is not None
    assert rows.covers_batch
    assert rows.row_offsets.tolist() == [0, 6, 12]
    assert rows.of(torch.tensor([[4], [7], [0]])).tolist() == [[4], [7]]  # one unused


def test_beside_a_tree_all_rows_are_attended_to_once() -> None:
    links, sources = np.arange(2, dtype=np.int32), np.ones(2, dtype=np.int8)
    chain = Draft(32, [3, 4], links, sources, is_chain=True)
    batch = VerifyBatch.build(
        [chain, TREE, None], np.array([31, 20, 8]), np.array([3, 6, 1])
    )
    assert batch.tree_requests.tolist() == [1]
    rows = batch.tree_rows()
    assert rows is not None
    assert rows.covers_batch
    assert rows.prefix_lens.tolist() == [31, 20, 8]
    assert rows.query_starts.tolist() == [0, 3, 9]
    assert rows.row_offsets.tolist() == [0, 3, 9, 10]
    assert rows.ancestors.tolist()[:3] == [0b1, 0b11, 0b111]
    assert rows.ancestors.tolist()[-1] == 0b1


def test_without_a_tree_our_attention_takes_large_batches() -> None:
    batch = VerifyBatch.build([None] * 2, np.array([5, 9]), np.array([1, 1]))
    assert batch.tree_rows(2.5) is None
    rows = batch.tree_rows(2)
    assert rows is not None
    assert rows.covers_batch
    assert rows.prefix_lens.tolist() == [5, 9]
    assert rows.ancestors.tolist() == [0b1, 0b1]
    with_prompt = VerifyBatch.build([None] * 2, np.array([0, 9]), np.array([5, 1]))
    assert with_prompt.tree_rows(2) is None


def test_no_tree_at_all() -> None:
    batch = VerifyBatch.build([None, None], np.array([0, 4]), np.array([7, 1]))
    assert batch.tree_rows() is None
    assert batch.positions().tolist() == [6, 4]
    assert batch.max_depth == 0
