# SPDX-License-Identifier: Apache-2.0
"""Losses and gradients against the original implementation's tensors."""

import json
from pathlib import Path

import pytest
import torch
from golden_cases import case_folders
from safetensors.torch import load_file

from vllm_clover2.model import Clover2Model, Packing
from vllm_clover2.model.weights import from_reference
from vllm_clover2.train.clover2 import TrainableClover2
from vllm_clover2.train.hidden import TargetStates
from vllm_clover2.train.losses import (
    LossRows,
    LossWeights,
    OnPolicy,
    draft_loss,
    label_agreement,
)


@pytest.mark.parametrize("variant", ["plain", "label_mask"])
@pytest.mark.parametrize(
    "case", case_folders("loss.safetensors"), ids=lambda case: case.name
)
def test_losses_and_gradients_match(case: Path, variant: str) -> None:
    reference = load_file(case / "weights.safetensors")
    config, state, report = from_reference(
        reference, json.loads((case / "config.json").read_text())
    )
    model = Clover2Model(config)
    model.load_state_dict(state)
    lm_head = reference["lm_head.weight"]
    golden = load_file(case / "loss.safetensors")
    batch = {k[6:]: v for k, v in golden.items() if k.startswith("batch.")}

    # The padded texts of the batch, one behind the other.
    lengths = tuple([batch["input_ids"].shape[1]] * len(batch["input_ids"]))
    batch = {key: tensor.flatten(0, 1) for key, tensor in batch.items()}
    agreement = None
    if variant == "label_mask":
        agreement = label_agreement(batch["hidden_states"], batch["input_ids"], lm_head)
    rows = LossRows.build(
        batch["loss_mask"], lengths, config.num_draft_steps, agreement
    )
    states = TargetStates(batch["hidden_states_onnorm"], batch["hidden_states"])
    embeddings = lm_head[batch["input_ids"]]
    outputs = TrainableClover2(model)(states, embeddings, Packing(lengths), rows)
    result = draft_loss(outputs, batch["target"], rows, lm_head, LossWeights())

    def close(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        torch.testing.assert_close(actual, expected, atol=limit, rtol=0)

    close(result.ploss, golden[f"{variant}.ploss"], 5e-5)
    close(result.vloss, golden[f"{variant}.vloss"], 5e-5)
    close(result.loss.detach()[None], golden[f"{variant}.loss"], 5e-5)

    result.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    prefix = f"{variant}.grad."
    stored = [key for key in golden if key.startswith(prefix)]
    assert stored
    for key in stored:
        close(gradients[report.taken[key[len(prefix) :]]], golden[key], 1e-5)
    norms = json.loads((case / "loss.json").read_text())[variant]["grad_l2"]
    assert len(norms) == len(gradients)
    for key, norm in norms.items():
        found = float(gradients[report.taken[key]].double().norm())
        assert found == pytest.approx(norm, rel=1e-5)


LENGTHS = (6, 5)
MASK = torch.tensor([0, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)


def text_of(position: int) -> int:
    return int(position >= LENGTHS[0])


def test_gathered_rows_cover_exactly_the_mask() -> None:
    rows = LossRows.build(MASK, LENGTHS, num_steps=3)
    for step in range(3):
        reached = {int(t) + step for t, w in zip(rows.position, rows.weight[step]) if w}
        wanted = {
            int(s)
            for s in MASK.nonzero()
            if s >= step and text_of(s) == text_of(s - step)
        }
        assert reached == wanted
        for column in rows.weight[step].nonzero()[:, 0]:
            label = rows.label[step, column]
            assert rows.label_position[label] == rows.position[column] + step


def test_chunked_loss_equals_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, a reduced vocabulary: same value and gradient as autograd."""
    torch.manual_seed(0)
    vocab, hidden, num_steps = 11, 6, 2
    monkeypatch.setattr("vllm_clover2.train.losses._CHUNK_LOGITS", 3 * vocab)
    rows = LossRows.build(MASK, LENGTHS, num_steps)
    lm_head = torch.randn(vocab, hidden)
    targets = torch.randn(len(MASK), hidden)
    outputs = torch.randn(num_steps, len(rows.position), hidden, requires_grad=True)
    weights = LossWeights(value=0.0, prob=1.0, decay=0.5)
    result = draft_loss(outputs, targets, rows, lm_head, weights, count_agreed=True)
    result.loss.backward()

    again = outputs.detach().clone().requires_grad_()
    total = torch.zeros(())
    for step in range(num_steps):
        terms = []
        for column, position in enumerate(rows.position.tolist()):
            reached = position + step
            if text_of(reached) == text_of(position) and MASK[reached]:
                wanted = (lm_head @ targets[reached]).softmax(-1)
                found = (lm_head @ again[step, column]).log_softmax(-1)
                terms.append(-(wanted * found).sum())
        total = total + 0.5**step * sum(terms) / (len(terms) + 1)
    total.backward()
    torch.testing.assert_close(result.loss, total)
    torch.testing.assert_close(outputs.grad, again.grad)
    assert result.agreed is not None
    assert (result.agreed <= result.weight).all()


def test_later_steps_are_taken_at_a_random_share_of_the_rows() -> None:
    torch.manual_seed(0)
    mask = torch.ones(100, dtype=torch.bool)
    whole = LossRows.build(mask, (100,), num_steps=2)
    rows = LossRows.build(mask, (100,), num_steps=2, later_share=0.25)
    assert (whole.num_later, rows.num_later) == (100, 25)
    assert sorted(rows.position.tolist()) == whole.position.tolist()
    assert len(set((rows.position[:25] // 25).tolist())) == 4
    lm_head, targets = torch.randn(9, 6), torch.randn(100, 6)
    first, later = torch.randn(2, 100, 6)
    result = draft_loss([first, later[:25]], targets, rows, lm_head, LossWeights())
    expected = float(rows.weight[1, :25].sum())
    assert result.weight.tolist() == [100, expected]
    of_step = rows.label[1, :25]
    wanted = (targets[rows.label_position] @ lm_head.T).softmax(-1)[of_step]
    each = -(wanted * (later[:25] @ lm_head.T).log_softmax(-1)).sum(-1)
    weighted = (rows.weight[1, :25] * each).sum()
    torch.testing.assert_close(result.ploss[1], weighted / (expected + 1))


@pytest.mark.slow
def test_compiled_loss_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    rows = LossRows.build(MASK, LENGTHS, num_steps=2)
    lm_head, targets = torch.randn(16, 6), torch.randn(len(MASK), 6)
    results = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(1)
        outputs = torch.randn(2, len(rows.position), 6, generator=generator)
        outputs.requires_grad_()
        result = draft_loss(
            outputs, targets, rows, lm_head, LossWeights(), compiled=compiled
        )
        result.loss.backward()
        results.append((result.loss, outputs.grad))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


def test_on_policy_steps_count_where_the_draft_held_the_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_clover2.train.losses._CHUNK_LOGITS", 2 * 4)
    mask = torch.ones(5, dtype=torch.bool)
    mask[-1] = False
    rows = LossRows.build(mask, (5,), num_steps=3)
    assert rows.position.tolist() == [0, 1, 2, 3]
    # Step 0 proposes 0, then 1 as its second choice; later steps 2, then 3.
    outputs = torch.tensor([[4.0, 3.0, 0.0, 0.0], [1.0, 0.0, 9.0, 2.0]])
    outputs = torch.stack([outputs[[0] * 4], outputs[[1] * 4], outputs[[1] * 4]])
    text = torch.tensor([0, 1, 2, -1])  # after the labels at 0, 1, 2, 3

    def weight(top_k: int) -> list[float]:
        result = draft_loss(
            outputs,
            torch.zeros(5, 4),
            rows,
            torch.eye(4),
            LossWeights(),
            on_policy=OnPolicy(text, top_k),
        )
        return result.weight.tolist()

    # Step 0 counts everywhere. Its choices hold the text at 0 (both), and at 1 among
    # two; at 2 and 3 never. Step 1 from 1 reaches the label at 2, whose text is 2.
    assert weight(top_k=1) == [4, 1, 0]
    assert weight(top_k=2) == [4, 2, 1]


def test_agreement_follows_rank_and_mass() -> None:
    # Probabilities 0.5, 0.4, 0.1 at every position.
    post_norm = torch.tensor([0.5, 0.4, 0.1]).log().expand(4, 3)
    next_ids = torch.tensor([0, 1, 2, 2])
    agreement = label_agreement(post_norm, next_ids, torch.eye(3), top_k=3, top_p=0.8)
    assert agreement.tolist() == [True, True, False, False]
    agreement = label_agreement(post_norm, next_ids, torch.eye(3), top_k=1, top_p=0.8)
    assert agreement.tolist() == [True, False, False, False]


def test_steps_after_a_disagreement_have_no_weight() -> None:
    mask = torch.tensor([True, True, True, True, False])
    agreement = torch.tensor([True, False, True, True, True])
    rows = LossRows.build(mask, (5,), num_steps=3, agreement=agreement)
    weight = {int(t): rows.weight[:, i].tolist() for i, t in enumerate(rows.position)}
    assert weight == {0: [1, 0, 0], 1: [0, 0, 0], 2: [1, 1, 0], 3: [1, 0, 0]}
