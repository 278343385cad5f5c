# SPDX-License-Identifier: Apache-2.0
"""EAGLE-1: its trees against brute force over paths, and its training runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scoring_draft import ScoringDraft
from training_runs import ACCEPTANCE_FLOOR, acceptance, changed, run_until

from vllm_clover2.model import Eagle1Config, Eagle1Model, Packing
from vllm_clover2.model.eagle1 import load_eagle1, save_eagle1
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import pack, read_answers
from vllm_clover2.train.eagle1 import Eagle1Replay, new_eagle1
from vllm_clover2.train.evaluate import parse_tree
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.loop import Trainer, train
from vllm_clover2.tree import TreeGrower


@pytest.fixture
def eagle_config(tiny_config: TrainConfig) -> TrainConfig:
    return changed(tiny_config, architecture="eagle1", num_layers=1, num_draft_steps=1)


def random_head(target: Target, draft_vocab_ids: list[int] | None) -> Eagle1Model:
    """Weights so wide that every ancestor matters; wider ones amplify rounding."""
    torch.manual_seed(8)
    shape = target.config
    model = Eagle1Model(
        Eagle1Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=48,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            draft_vocab_ids=draft_vocab_ids,
        )
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.2)
    return model.eval()


class BruteForce(ScoringDraft):
    """A draft whose state is a path: everything is computed anew for every node."""

    def __init__(
        self, model: Eagle1Model, target: Target, texts: list[torch.Tensor]
    ) -> None:
        self.model, self.target, self.texts = model, target, texts

    def first(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.arange(len(self.texts))[:, None]
        return numbers, self._log_probs(numbers)

    def advance(
        self, state: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = torch.cat([state, tokens[:, None]], dim=1)
        return state, self._log_probs(state)

    def token_ids(self, draft_ids: torch.Tensor) -> torch.Tensor:
        ids = self.model.draft_vocab_ids
        return draft_ids if ids is None else ids[draft_ids]

    def _log_probs(self, state: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._after(row[0], row[1:]) for row in state])

    def _after(self, number: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        text = self.texts[number]  # up to the root
        hidden = self.target.hidden(text[:-1], (len(text) - 1,))
        features, consumed = self.target.post_norm(hidden), text[1:]
        for token in [*path, None]:
            out = self.model.forward_packed(
                features,
                self.target.embeddings[consumed],
                Packing((len(features),)),
            )
            if token is not None:
                features = torch.cat([features, out[-1:]])
                consumed = torch.cat([consumed, token[None]])
        ids = self.model.draft_vocab_ids
        scored = self.target.lm_head if ids is None else self.target.lm_head[ids]
        return torch.log_softmax(scored @ out[-1], dim=-1)


@torch.inference_mode()
@pytest.mark.parametrize("ids", [None, [*range(3, 43)]], ids=["whole", "reduced"])
@pytest.mark.parametrize("tree", ["chain:4", "paper", "dynamic:60:4"])
def test_trees_equal_brute_force_over_paths(
    tiny_target: Path, tiny_answers: Path, ids: list[int] | None, tree: str
) -> None:
    target = Target.load(str(tiny_target), torch.float32, torch.device("cpu"))
    model = random_head(target, ids)
    answers = read_answers(tiny_answers, 48, limit=9)
    batch = pack(answers, np.array([2, 8, 5, 1]))
    replay = Eagle1Replay(model, target, target.states(batch), batch)
    chosen = torch.tensor([3, 0, 1])  # lockstep drops answers that have ended
    roots = torch.tensor([1, 17, batch.lengths[1] - 2])
    texts = batch.input_ids.split(batch.lengths)
    known = [texts[n][: root + 1] for n, root in zip(chosen, roots, strict=True)]

    grower = TreeGrower(parse_tree(tree))
    grown = grower.grow(*replay.at(chosen, roots), None).trees
    brute_force = BruteForce(model, target, known)
    expected = grower.grow(brute_force, torch.zeros(3, 1), None).trees
    for name in ("tokens", "parents", "depths", "sizes"):
        assert torch.equal(getattr(grown, name), getattr(expected, name)), name
    torch.testing.assert_close(grown.joint, expected.joint, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_training_raises_acceptance(eagle_config: TrainConfig) -> None:
    config = changed(eagle_config, steps=300, ema_decay=0.9, draft_vocab_size=40)
    untrained = train(
        changed(
            config,
            steps=1,
            warmup_steps=0,
            learning_rate=1e-9,
            output=config.output / "untrained",
        )
    )
    before = acceptance(config, untrained)
    head = train(config)
    after = acceptance(config, head)
    assert after > max(ACCEPTANCE_FLOOR, before + 0.5), (before, after)
    assert acceptance(config, head, "dynamic:25:3") > after
    model = load_eagle1(head)
    assert model.config.draft_vocab_size == len(model.draft_vocab_ids) == 40
    assert model.config.target["hidden_size"] == 32
    assert model.config.training["settings"]["architecture"] == "eagle1"


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"muon_lr": 1e-3}, {"feature_noise": 0.1}],
    ids=["plain", "muon", "noise"],
)
def test_resuming_inside_an_epoch_gives_the_same_weights(
    eagle_config: TrainConfig, settings: dict[str, float]
) -> None:
    whole = changed(eagle_config, output=eagle_config.output / "whole", **settings)
    train(whole)
    halves = changed(whole, output=eagle_config.output / "halves", save_every=7)
    run_until(Trainer(halves), 8)
    train(halves)
    expected = load_eagle1(whole.output / "head").state_dict()
    for name, tensor in load_eagle1(halves.output / "head").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_noise_disturbs_inputs_and_not_labels(eagle_config: TrainConfig) -> None:
    plain = Trainer(eagle_config)
    noisy = Trainer(changed(eagle_config, feature_noise=0.3))
    batch = next(plain._batches_from(0))[1]
    seen = []
    for trainer in (plain, noisy):
        torch.manual_seed(0)
        trainer.model.register_forward_pre_hook(
            lambda _, arguments: seen.append(arguments[0].post_norm)
        )
        trainer._loss(batch, validating=False, count_agreed=False)
        trainer._loss(batch, validating=True, count_agreed=False)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3])
    difference = (seen[2] - seen[0]).abs()
    assert 0.27 < difference.max() <= 0.3 + 1e-5


def test_a_trained_head_can_be_trained_further(eagle_config: TrainConfig) -> None:
    config = changed(eagle_config, draft_vocab_size=40)
    head = train(config)
    further = changed(config, output=config.output / "further", start_from=head)
    trainer = Trainer(further)
    start = load_eagle1(head)
    assert torch.equal(trainer.draft.draft_vocab_ids, start.draft_vocab_ids)
    assert torch.equal(trainer.draft.fc.weight, start.fc.weight)
    with pytest.raises(ValueError, match="is no clover2 head"):
        Trainer(changed(further, architecture="clover2"))


@pytest.mark.parametrize("start", ["scaled", "reference"])
def test_new_heads_start_with_visible_tokens(
    eagle_config: TrainConfig, start: str
) -> None:
    trainer = Trainer(changed(eagle_config, init_recurrence=start))
    target = trainer.target
    embedding, feature = trainer.draft.fc.weight.detach().chunk(2, dim=1)
    if start == "reference":  # nn.Linear's own start
        assert trainer.draft.fc.weight.abs().max() <= 1 / 8
        return
    assert feature.diagonal().mean() == pytest.approx(1.0, abs=0.01)
    batch = pack(trainer.answers, np.arange(4))
    token = target.embeddings[batch.input_ids] @ embedding.T
    state = target.states(batch).post_norm @ feature.T
    share = token.square().mean().sqrt() / state.square().mean().sqrt()
    assert 0.2 < share < 0.4
    layer = target.model.get_decoder().layers[-1]
    ours = trainer.draft.layers[0].self_attn.k_proj.weight
    assert torch.equal(ours, layer.self_attn.k_proj.weight)


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"num_draft_steps": 3}])
def test_depths_that_eagle_does_not_have_are_refused(
    eagle_config: TrainConfig, change: dict[str, int]
) -> None:
    with pytest.raises(ValidationError, match="num_draft_steps must be 1"):
        changed(eagle_config, **change)


def test_noise_belongs_to_eagle(tiny_config: TrainConfig) -> None:
    with pytest.raises(ValidationError, match="feature_noise belongs to .* eagle1"):
        changed(tiny_config, feature_noise=0.1)


def test_scaled_positions_of_a_target_are_refused(
    eagle_config: TrainConfig, tiny_target: Path
) -> None:
    target = Target.load(str(tiny_target), torch.float32, torch.device("cpu"))
    target.config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="set rope_theta"):
        new_eagle1(eagle_config, target, None, None)


def test_heads_survive_writing_and_reading(tiny_target: Path, tmp_path: Path) -> None:
    target = Target.load(str(tiny_target), torch.float32, torch.device("cpu"))
    model = random_head(target, [1, 5, 47])
    model.config.training = {"settings": {"seed": 0}}
    save_eagle1(model, tmp_path, torch.float32)
    found = load_eagle1(tmp_path)
    assert found.config.rope_theta == 100.0
    assert found.config.training == model.config.training
    assert found.draft_vocab_ids.tolist() == [1, 5, 47]
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("draft_vocab_ids", [5, 1], "must be ascending"),
        ("draft_vocab_ids", [1, 48], "below the vocabulary size 48"),
        ("num_hidden_layers", 2, "num_hidden_layers 1, found 2"),
        ("attention_bias", True, "attention_bias"),
        ("intermediate_size", 50, r"has shape \(32, 48\), expected \(32, 50\)"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    tiny_target: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    target = Target.load(str(tiny_target), torch.float32, torch.device("cpu"))
    save_eagle1(random_head(target, None), tmp_path, torch.float32)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message):
        load_eagle1(tmp_path)
