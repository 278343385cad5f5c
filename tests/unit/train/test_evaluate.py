# SPDX-License-Identifier: Apache-2.0
"""Offline replay against a step-by-step simulation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import TINY_TRAINING

from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import load_head, save_head
from vllm_clover2.train.architectures import ARCHITECTURES
from vllm_clover2.train.clover2 import HeadDraft
from vllm_clover2.train.config import EvaluateConfig, TrainConfig
from vllm_clover2.train.data import AnswerSet, read_answers
from vllm_clover2.train.evaluate import evaluate, evaluate_head, parse_tree
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.loop import train

CLOVER2 = ARCHITECTURES["clover2"]


@pytest.fixture
def target(tiny_target: Path) -> Target:
    return Target.load(str(tiny_target), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def head_folder(
    tiny_target: Path, tiny_answers: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A head that is right now and then."""
    return train(
        TrainConfig(
            target=str(tiny_target),
            answers=tiny_answers,
            output=tmp_path_factory.mktemp("run"),
            draft_vocab_size=40,
            steps=80,
            **TINY_TRAINING,
        )
    )


@pytest.fixture
def head(head_folder: Path) -> Clover2Model:
    return load_head(head_folder).eval()


@torch.inference_mode()
def simulate_chain(
    head: Clover2Model, target: Target, answers: AnswerSet, index: int, depth: int
) -> tuple[int, int, int]:
    """Steps, accepted and emitted tokens of one answer, one position at a time."""
    tokens = torch.from_numpy(answers.answer(index).astype(np.int64))
    weight, ids = target.lm_head, head.draft_vocab_ids
    steps = accepted = emitted = 0
    root = int(answers.prompt_lens[index])
    while root < len(tokens) - 1:
        # Only what serving would know: the tokens up to the root.
        hidden = target.hidden(tokens[:root], (root,))[None]
        g = head.augment(hidden, weight[tokens[None, 1 : root + 1]])[0, -1:]
        out, drafted = head.recurrent.first(g), []
        for _ in range(depth):
            drafted.append(int(ids[(out @ weight[ids].T).argmax()]))
            g, out = head.recurrent.advance(g, weight[drafted[-1]][None])
        length = 0
        while (
            length < depth
            and root + 1 + length < len(tokens)
            and drafted[length] == tokens[root + 1 + length]
        ):
            length += 1
        steps, accepted = steps + 1, accepted + length
        emitted += min(length + 1, len(tokens) - 1 - root)
        root += length + 1
    return steps, accepted, emitted


def test_replay_equals_a_simulation(
    head: Clover2Model, target: Target, tiny_answers: Path
) -> None:
    answers = read_answers(tiny_answers, 48, limit=12)
    totals = np.sum(
        [simulate_chain(head, target, answers, index, 3) for index in range(12)], axis=0
    )
    assert totals[1] > 0  # otherwise nothing is compared
    result = evaluate_head(
        head, CLOVER2, target, answers, np.arange(12), ["chain:3"], max_tokens=128
    )["chain:3"]
    assert result["steps"] == totals[0]
    assert result["accepted_per_step"] == pytest.approx(totals[1] / totals[0], abs=1e-3)
    assert result["tokens_per_step"] == pytest.approx(totals[2] / totals[0], abs=1e-3)
    assert result["nodes_per_step"] == 3
    assert set(result["by_task"]) == {"even", "odd"}
    # Every token after the first is emitted exactly once.
    assert totals[2] == sum(answers.lengths - answers.prompt_lens - 1)


def test_wider_trees_accept_at_least_as_much(
    head: Clover2Model, target: Target, tiny_answers: Path
) -> None:
    answers = read_answers(tiny_answers, 48, limit=40)
    result = evaluate_head(
        head,
        CLOVER2,
        target,
        answers,
        np.arange(40),
        ["chain:5", "paper", "dynamic:40"],
    )
    first_level = [
        result[name]["acceptance_by_depth"][0] for name in ("chain:5", "paper")
    ]
    assert first_level[0] < first_level[1]
    assert result["paper"]["nodes_per_step"] == 25
    assert result["dynamic:40"]["nodes_per_step"] <= 40
    for entry in result.values():
        shares = entry["acceptance_by_depth"]
        assert shares == sorted(shares, reverse=True)


def test_drafted_ids_belong_to_the_target(head: Clover2Model, target: Target) -> None:
    draft = HeadDraft(head, target.lm_head)
    _, (log_probs, _) = draft.first_top_k(torch.randn(2, 32), 40)
    assert log_probs.shape == (2, 40)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2))
    assert torch.equal(draft.token_ids(torch.arange(40)), head.draft_vocab_ids)


@pytest.mark.parametrize(
    "name",
    ["chain", "chain:x", "paper:3", "dynamic", "bush:3", "chain:0", "paper+context"],
)
def test_unknown_trees_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="tree"):
        parse_tree(name)


def test_head_of_another_target_is_refused(
    head: Clover2Model, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    head.config.vocab_size = 50
    save_head(head, tmp_path / "head", torch.float32)
    with pytest.raises(ValueError, match="vocab_size must equal the target's 48"):
        evaluate(
            EvaluateConfig(
                target=tiny_config.target,
                head=tmp_path / "head",
                answers=tiny_config.answers,
            )
        )


def test_a_model_that_is_no_draft_is_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"no draft head: .*found 'gpt2'"):
        evaluate(
            EvaluateConfig(
                target=tiny_config.target, head=tmp_path, answers=tiny_config.answers
            )
        )
