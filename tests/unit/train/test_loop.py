# SPDX-License-Identifier: Apache-2.0
"""Whole runs on a tiny random target: learning, resuming, failing."""

import csv
import errno
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from training_runs import ACCEPTANCE_FLOOR, acceptance, changed, run_until

from vllm_clover2.model import Clover2Config
from vllm_clover2.model.weights import load_head
from vllm_clover2.train.card import card
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import pack
from vllm_clover2.train.loop import Trainer, train
from vllm_clover2.train.optimizers import lr_factor
from vllm_clover2.train.start import frequent_tokens


@pytest.mark.slow
def test_training_raises_acceptance(tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, steps=300, ema_decay=0.9, draft_vocab_size=40)
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

    model = load_head(head)
    assert model.config.draft_vocab_size == len(model.draft_vocab_ids) == 40
    assert model.config.target["hidden_size"] == 32
    assert model.config.training["settings"]["steps"] == 300
    rows = list(csv.DictReader((config.output / "metrics.csv").open()))
    assert int(float(rows[-1]["step"])) == 300
    assert float(rows[-1]["ploss_0"]) < float(rows[0]["ploss_0"]) - 0.5
    assert (config.output / "metrics.png").read_bytes().startswith(b"\x89PNG")
    validation = json.loads((config.output / "metrics.json").read_text())
    assert len(validation[-1]["agreement"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_decay": 0.8}, {"muon_lr": 1e-3}, {"later_share": 0.5}],
    ids=["plain", "ema", "muon", "sample"],
)
def test_resuming_inside_an_epoch_gives_the_same_weights(
    tiny_config: TrainConfig, settings: dict[str, float]
) -> None:
    whole = changed(tiny_config, output=tiny_config.output / "whole", **settings)
    assert 7 % len(Trainer(whole)._epoch(0)) != 0  # noqa: SLF001 - inside an epoch
    train(whole)

    halves = changed(whole, output=tiny_config.output / "halves", save_every=7)
    first = Trainer(halves)
    run_until(first, 8)
    assert first.run_directory.latest().name == "step-0000007"
    train(halves)

    expected = load_head(whole.output / "head").state_dict()
    for name, tensor in load_head(halves.output / "head").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_a_run_in_several_pieces_of_time_gives_the_same_weights(
    tiny_config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = changed(tiny_config, output=tiny_config.output / "whole")
    train(whole)
    pieces = changed(whole, output=tiny_config.output / "pieces", max_minutes=1e-6)
    for step in (4, 8, 12):  # logged steps: time is looked at there
        train(pieces)
        assert Trainer(pieces).run_directory.latest().name == f"step-{step:07d}"
    assert "stopped after step 8 of 12" in capsys.readouterr().out

    expected = load_head(whole.output / "head").state_dict()
    for name, tensor in load_head(pieces.output / "head").state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.slow
def test_cached_hidden_states_change_nothing(tiny_config: TrainConfig) -> None:
    # bf16 both ways: the cache stores bf16.
    plain = changed(tiny_config, precision="bf16", output=tiny_config.output / "a")
    cached = changed(
        plain,
        output=tiny_config.output / "b",
        hidden_cache=tiny_config.output / "cache",
    )
    train(plain)
    train(cached)  # fills the cache
    train(changed(cached, output=tiny_config.output / "c"))  # only reads it
    expected = load_head(plain.output / "head").state_dict()
    for folder in ("b", "c"):
        found = load_head(tiny_config.output / folder / "head").state_dict()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("change", ["weights", "precision"])
def test_cache_of_other_states_is_refused(
    tiny_config: TrainConfig, tmp_path: Path, change: str
) -> None:
    """Of a target of the same name and shape."""
    target = shutil.copytree(tiny_config.target, tmp_path / "target")
    cached = changed(tiny_config, target=str(target), hidden_cache=tmp_path / "cache")
    Trainer(cached)
    Trainer(cached)  # the same again
    if change == "weights":
        weights = load_file(target / "model.safetensors")
        weights["model.norm.weight"] *= 2
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    else:
        AcceleratorState._reset_state(reset_partial_state=True)
        cached = changed(cached, precision="bf16")
    name = {"weights": "target", "precision": "dtype"}[change]
    with pytest.raises(ValueError, match=rf"cache .* made otherwise .*'{name}'"):
        Trainer(cached)


def test_run_of_another_target_is_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(tiny_config)
    target = shutil.copytree(tiny_config.target, tmp_path / "target")
    train(changed(tiny_config, target=str(target)))  # the same elsewhere
    weights = load_file(target / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="'target': "):
        train(changed(tiny_config, target=str(target)))


def test_cache_computes_only_what_is_missing(tiny_config: TrainConfig) -> None:
    trainer = Trainer(changed(tiny_config, hidden_cache=tiny_config.output / "cache"))
    cache = trainer.cache
    assert cache is not None
    computed: list[int] = []
    hidden = cache.target.hidden

    def counting(ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
        computed.append(len(lengths))
        return hidden(ids, lengths)

    cache.target.hidden = counting  # type: ignore[method-assign]
    first = cache.fetch(pack(trainer.answers, np.array([0, 1])))
    more = pack(trainer.answers, np.array([2, 1, 3]))
    states = cache.fetch(more)
    assert computed == [2, 2]
    middle = states[more.lengths[0] :][: more.lengths[1]]
    assert torch.equal(middle, first[-more.lengths[1] :])
    whole = hidden(more.input_ids, more.lengths).to(torch.bfloat16)
    torch.testing.assert_close(states, whole)


def test_nan_loss_stops_and_keeps_the_last_checkpoint(
    tiny_config: TrainConfig,
) -> None:
    config = changed(tiny_config, save_every=4)
    trainer = Trainer(config)
    states = trainer._states  # noqa: SLF001

    def poisoned(batch: object) -> object:
        found = states(batch)
        if trainer.step == 6:
            found.pre_norm.fill_(math.nan)
        return found

    trainer._states = poisoned  # type: ignore[method-assign] # noqa: SLF001
    with pytest.raises(RuntimeError, match="not finite at step 6.*step-0000004"):
        trainer.run()
    load_head(config.output / "head")  # refuses NaN


def test_full_disk_leaves_the_last_checkpoint(
    tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(tiny_config, save_every=4)
    trainer = Trainer(config)
    save_state = trainer.accelerator.save_state

    def no_space(folder: str) -> None:
        save_state(folder)  # some files are there already when the disk is full
        if trainer.step == 8:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.accelerator, "save_state", no_space)
    with pytest.raises(RuntimeError, match="No space left.*step-0000004"):
        trainer.run()
    left = sorted(path.name for path in (config.output / "checkpoints").iterdir())
    assert left == ["step-0000004"]
    resumed = Trainer(config)
    resumed.resume()
    assert resumed.step == 4


def test_damaged_checkpoint_is_named(tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, steps=4)
    train(config)
    checkpoint = config.output / "checkpoints" / "step-0000004"
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-0000004 cannot be loaded"):
        train(changed(config, steps=8))


@pytest.mark.parametrize("change", [{"num_layers": 2}, {"seed": 1}])
def test_another_run_in_the_same_folder_is_refused(
    tiny_config: TrainConfig, change: dict[str, int]
) -> None:
    config = changed(tiny_config, steps=4)
    train(config)
    with pytest.raises(ValueError, match="made otherwise.*own output folder"):
        train(changed(config, steps=8, **change))


def test_checkpoint_of_another_shape_is_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = changed(tiny_config, steps=4)
    train(config)
    wider = changed(config, num_layers=2, output=tmp_path / "wider")
    trainer = Trainer(wider)
    shutil.copytree(
        config.output / "checkpoints" / "step-0000004",
        wider.output / "checkpoints" / "step-0000004",
    )
    with pytest.raises(ValueError, match="another output folder"):
        trainer.resume()


def test_a_longer_run_continues_and_logs_each_step_once(
    tiny_config: TrainConfig,
) -> None:
    config = changed(tiny_config, save_every=5, log_every=1, keep_checkpoints=5)
    train(config)
    shutil.rmtree(config.output / "checkpoints" / "step-0000012")
    train(changed(config, steps=14))
    rows = list(csv.DictReader((config.output / "metrics.csv").open()))
    assert [int(float(row["step"])) for row in rows] == list(range(1, 15))
    record = json.loads((config.output / "run.json").read_text())
    assert len(record["earlier_commands"]) == 1


def test_run_directory_of_other_data_is_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    train(changed(tiny_config, steps=3))
    fewer = tmp_path / "fewer.jsonl"
    lines = tiny_config.answers.read_text().splitlines(keepends=True)
    fewer.write_text("".join(lines[:100]))
    with pytest.raises(ValueError, match="made otherwise.*own output folder"):
        train(changed(tiny_config, answers=fewer))


def test_label_mask_leaves_rows_out(tiny_config: TrainConfig) -> None:
    plain = Trainer(tiny_config)
    batch = next(plain._batches_from(0))[1]  # noqa: SLF001
    masked = Trainer(changed(tiny_config, label_mask=True))
    weights = [
        one._loss(batch, False, False).weight  # noqa: SLF001
        for one in (plain, masked)
    ]
    # Greedy answers agree with the target everywhere but at the random prompt, from
    # where only the later steps reach an answer.
    assert weights[1][0] == weights[0][0]
    assert (weights[1][1:] < weights[0][1:]).all()
    assert (weights[1] > 0.5 * weights[0]).all()


@pytest.mark.parametrize("setting", [{"on_policy_top_k": 2}, {"later_share": 0.5}])
def test_later_steps_are_left_out_but_not_in_validation(
    tiny_config: TrainConfig, setting: dict[str, float]
) -> None:
    plain = Trainer(tiny_config)
    own = Trainer(changed(tiny_config, **setting))
    batch = next(plain._batches_from(0))[1]
    weights = [
        trainer._loss(batch, validating, False).weight
        for trainer, validating in ((plain, False), (own, False), (own, True))
    ]
    assert weights[1][0] == weights[0][0]
    assert (weights[1][1:] < weights[0][1:]).all()
    assert torch.equal(weights[2], weights[0])


def test_prompts_are_learned_but_not_validated(tiny_config: TrainConfig) -> None:
    plain = Trainer(tiny_config)
    with_prompts = Trainer(changed(tiny_config, learn_prompts=True))
    batch = next(with_prompts._batches_from(0))[1]
    assert batch.loss_mask.sum() == len(batch.input_ids) - len(batch.lengths)
    assert with_prompts.validate() == plain.validate()


@pytest.mark.slow
def test_training_goes_on_from_a_head(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = changed(tiny_config, steps=60, draft_vocab_size=40)
    first = train(config)
    further = changed(config, steps=1, warmup_steps=0, learning_rate=1e-9)
    further = changed(further, output=tmp_path / "further", start_from=first)
    further = changed(further, num_draft_steps=2)
    head = load_head(train(further))
    assert head.config.num_draft_steps == 2
    for name, tensor in load_head(first).state_dict().items():
        # Written in bf16, read, moved by next to nothing, written again.
        assert torch.equal(head.state_dict()[name], tensor), name
    assert head.config.training["started_from"]["settings"]["steps"] == 60
    with pytest.raises(ValueError, match="num_layers must be that of start_from, 1"):
        Trainer(changed(further, num_layers=2, output=tmp_path / "other"))


def test_only_answers_of_the_wanted_temperatures_are_used(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    lines = tiny_config.answers.read_text().splitlines()
    mixed = tmp_path / "mixed.jsonl"
    records = [json.loads(line) for line in lines]
    for number, record in enumerate(records):
        record["temperature"] = [0.0, 0.7][number % 2]
    mixed.write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = Trainer(
        changed(tiny_config, answers=mixed, temperatures=[0.7], max_answers=100)
    )
    used = np.concatenate([trainer.train_indices, trainer.val_indices])
    assert sorted(used) == list(range(1, 100, 2))


def test_the_head_has_a_card(tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, evaluate_every=6, draft_vocab_size=40)
    path = train(config) / "README.md"
    card = ModelCard.load(path)
    assert card.data.tags == ["speculative-decoding", "clover2"]
    assert card.data.base_model is None  # a folder here
    assert "| draft vocabulary | 40 tokens, " in card.text
    rows = [line.split(" | ")[0] for line in card.text.splitlines()[-2:]]
    assert rows == ["| 6", "| 12"]
    path.write_text("mine")
    train(config)  # nothing is left to do
    assert path.read_text() == "mine"
    train(changed(config, steps=13))
    assert path.read_text() != "mine"


def test_a_card_names_the_target_on_the_hub(tiny_config: TrainConfig) -> None:
    head = Clover2Config(
        target={"name": "model"},
        training={
            "command": ["vllm-clover2", "train"],
            "draft_vocab_coverage": 1.0,
            "data": {"num_train": 9, "num_validation": 1, "answers_sha256": "ab"},
        },
    )
    text = card(changed(tiny_config, target="org/model"), head, [])
    assert ModelCard(text).data.base_model == "org/model"
    assert "# Clover-2 head for model" in text


def test_old_checkpoints_are_dropped(tiny_config: TrainConfig) -> None:
    config = changed(tiny_config, save_every=3, keep_checkpoints=2)
    train(config)
    names = sorted(path.name for path in (config.output / "checkpoints").iterdir())
    assert names == ["step-0000009", "step-0000012"]


def test_answers_of_another_vocabulary_are_refused(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.jsonl"
    shutil.copy(tiny_config.answers, foreign)
    record = {"id": "x", "prompt_token_ids": [1, 2], "output_token_ids": [48]}
    with foreign.open("a") as lines:
        lines.write(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=r"vocabulary \[0, 48\), found 0\.\.48"):
        Trainer(changed(tiny_config, answers=foreign))


def test_frequent_tokens_are_ascending() -> None:
    assert frequent_tokens(np.array([5, 0, 3, 1, 1]), 2).tolist() == [0, 2]


def test_learning_rate_has_warmup_plateau_and_cosine(tiny_config: TrainConfig) -> None:
    config = changed(
        tiny_config,
        steps=100,
        warmup_steps=10,
        decay_fraction=0.5,
        final_lr_fraction=0.1,
    )
    factors = [lr_factor(step, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert set(factors[10:51]) == {1.0}
    assert factors[75] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
