# SPDX-License-Identifier: Apache-2.0
"""Reading answers, splitting and batching them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_clover2.train.data import (
    next_in_text,
    pack,
    read_answers,
    token_budget_batches,
)


def write(path: Path, records: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def record(name: str, prompt: list[int], output: list[int]) -> dict[str, object]:
    return {"id": name, "prompt_token_ids": prompt, "output_token_ids": output}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_answers_are_read_flat(tmp_path: Path, suffix: str) -> None:
    path = write(
        tmp_path / f"a{suffix}",
        [record("a", [1, 2], [3]), record("b", [4], [5, 6, 7])],
    )
    answers = read_answers(path, vocab_size=8)
    assert answers.lengths.tolist() == [3, 4]
    assert answers.answer(1).tolist() == [4, 5, 6, 7]
    assert answers.output_counts(8, np.arange(2)).tolist() == [0, 0, 0, 1, 0, 1, 1, 1]


def test_long_answers_are_cut_and_long_prompts_left_out(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        [
            record("cut", [1], [2] * 9),
            record("left out", [1] * 5, [2]),
            record("empty", [1], []),
        ],
    )
    answers = read_answers(path, vocab_size=3, max_length=5)
    assert answers.ids == ["cut"]
    assert answers.answer(0).tolist() == [1, 2, 2, 2, 2]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = write(
        tmp_path / "a.jsonl.gz", [record(str(i), [1], [i]) for i in range(99)]
    )
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"torn\.jsonl\.gz is damaged"):
        read_answers(torn, 100)
    fake = tmp_path / "fake.jsonl.gz"
    fake.write_text("{}")
    with pytest.raises(ValueError, match="is damaged"):
        read_answers(fake, 100)
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(record("a", [1], [2])) + '\n{"id": "b"}\n')
    with pytest.raises(ValueError, match="line 2: expected a JSON object"):
        read_answers(bad, 100)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match="no usable answer"):
        read_answers(empty, 100)


def test_split_follows_the_id_not_the_position(tmp_path: Path) -> None:
    records = [record(f"id-{i}", [1], [2]) for i in range(400)]
    first = read_answers(write(tmp_path / "a.jsonl", records), 3)
    turned = read_answers(write(tmp_path / "b.jsonl", records[::-1]), 3)
    train, held_out = first.split(0.1)
    assert sorted([*train, *held_out]) == list(range(400))
    assert 20 <= len(held_out) <= 60
    names = {first.ids[i] for i in held_out}
    assert names == {turned.ids[i] for i in turned.split(0.1)[1]}


@pytest.mark.parametrize("seed", [None, 5])
def test_batches_cover_everything_within_the_budget(seed: int | None) -> None:
    lengths = np.random.default_rng(0).integers(3, 90, size=500)
    indices = np.arange(0, 500, 2)
    batches = token_budget_batches(lengths, indices, 256, seed)
    assert sorted(np.concatenate(batches)) == indices.tolist()
    assert max(lengths[batch].sum() for batch in batches) <= 256
    assert len(batches) < 1.25 * lengths[indices].sum() / 256
    # Of similar length, because the target's pass pads them.
    padded = [len(batch) * lengths[batch].max() for batch in batches]
    assert sum(padded) < 1.2 * lengths[indices].sum()
    again = token_budget_batches(lengths, indices, 256, seed)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


def test_other_seeds_give_other_batches() -> None:
    lengths = np.random.default_rng(0).integers(3, 90, size=500)
    orders = [
        np.concatenate(token_budget_batches(lengths, np.arange(500), 256, seed))
        for seed in (1, 2)
    ]
    assert (orders[0] != orders[1]).any()


def test_an_answer_above_the_budget_gets_its_own_batch() -> None:
    lengths = np.array([4, 500, 5])
    batches = token_budget_batches(lengths, np.arange(3), 100, None)
    assert [batch.tolist() for batch in batches] == [[0, 2], [1]]


def test_no_answers_give_no_batches() -> None:
    assert token_budget_batches(np.array([3]), np.array([], dtype=int), 9, None) == []


def test_pack_masks_the_output_and_the_last_prompt_token(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", [record("a", [1, 2], [3, 4]), record("b", [5], [6])]
    )
    answers = read_answers(path, 9)
    batch = pack(answers, np.array([1, 0]))
    assert batch.input_ids.tolist() == [5, 6, 1, 2, 3, 4]
    # Not the last token of an answer: nothing follows whose state could be imitated.
    assert batch.loss_mask.int().tolist() == [1, 0, 0, 1, 1, 0]
    assert batch.lengths == (2, 4)
    assert batch.starts.tolist() == [0, 2]
    following = next_in_text(batch.input_ids, batch.lengths)
    assert following.tolist() == [6, 0, 2, 3, 4, 0]
    with_prompts = pack(answers, np.array([1, 0]), learn_prompts=True)
    assert with_prompts.loss_mask.int().tolist() == [1, 0, 1, 1, 1, 0]
    assert torch.equal(with_prompts.input_ids, batch.input_ids)


def test_answers_are_selected_by_place_and_temperature(tmp_path: Path) -> None:
    records = [
        record(f"id-{i}", [1], [2]) | {"temperature": i % 2 / 2} for i in range(6)
    ]
    answers = read_answers(write(tmp_path / "a.jsonl", records), 9)
    assert answers.select(None, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert answers.select(4, [0.5]).tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"temperature of \[1\.0\].*\[0\.0, 0\.5\]"):
        answers.select(None, [1.0])
