# SPDX-License-Identifier: Apache-2.0
"""Heads that read states of the target's inner layers too."""

from pathlib import Path

import pytest
import torch
from training_runs import ACCEPTANCE_FLOOR, acceptance, changed
from transformers import AutoModelForCausalLM

from vllm_clover2.model.weights import load_head
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import pack
from vllm_clover2.train.loop import Trainer, train


@pytest.fixture
def reading(tiny_config: TrainConfig) -> TrainConfig:
    return changed(tiny_config, aux_hidden_state_layers=[1])


@torch.inference_mode()
def test_states_are_those_after_so_many_layers(reading: TrainConfig) -> None:
    trainer = Trainer(reading)
    batch = pack(trainer.answers, trainer.train_indices[:3])
    states = trainer.target.states(batch)
    (inner,) = states.aux
    model = AutoModelForCausalLM.from_pretrained(reading.target).eval()
    texts = zip(
        batch.input_ids.split(batch.lengths),
        inner.split(batch.lengths),
        states.post_norm.split(batch.lengths),
        strict=True,
    )
    for text, after_first, at_end in texts:
        every = model(text[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(after_first, every[1][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(at_end, every[-1][0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_training_uses_them(reading: TrainConfig) -> None:
    config = changed(reading, steps=300)
    head = train(config)
    trained = load_head(head)
    assert trained.config.aux_hidden_state_layers == [1]
    assert trained.fusion is not None
    assert trained.fusion.weight.abs().max() > 0.01
    assert acceptance(config, head) > ACCEPTANCE_FLOOR


@pytest.mark.slow
def test_cached_states_change_nothing(reading: TrainConfig, tmp_path: Path) -> None:
    # bf16 both ways: the cache stores bf16.
    plain = changed(reading, precision="bf16", output=tmp_path / "plain")
    cached = changed(
        plain, output=tmp_path / "cached", hidden_cache=tmp_path / "states"
    )
    expected = load_head(train(plain)).state_dict()
    for name, tensor in load_head(train(cached)).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-3, rtol=0)
    other = changed(cached, aux_hidden_state_layers=None, output=tmp_path / "other")
    with pytest.raises(ValueError, match="'aux_hidden_state_layers': "):
        Trainer(other)


def test_a_head_begins_to_read_them(reading: TrainConfig, tmp_path: Path) -> None:
    """What is added is zero at first, then learned; it cannot be left out again."""
    plain = changed(reading, aux_hidden_state_layers=None, output=tmp_path / "plain")
    head = train(plain)
    further = Trainer(changed(reading, start_from=head))
    batch = next(further._batches_from(0))[1]  # noqa: SLF001
    losses = [
        trainer._loss(batch, False, False).loss  # noqa: SLF001
        for trainer in (further, Trainer(changed(plain, start_from=head)))
    ]
    torch.testing.assert_close(*losses)
    reads = load_head(further.run())
    assert reads.fusion is not None
    assert reads.fusion.weight.any()
    with pytest.raises(ValueError, match=r"that of start_from, \[1\], found None"):
        Trainer(changed(plain, start_from=further.run_directory.head))


def test_only_inner_layers_are_read(reading: TrainConfig) -> None:
    with pytest.raises(ValueError, match=r"inner layers, .* has 1, found \[1, 2\]"):
        Trainer(changed(reading, aux_hidden_state_layers=[1, 2]))
    eagle1 = {"architecture": "eagle1", "num_layers": 1, "num_draft_steps": 1}
    with pytest.raises(ValueError, match="belong to architecture clover2"):
        changed(reading, **eagle1)
