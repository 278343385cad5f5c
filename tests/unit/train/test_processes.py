# SPDX-License-Identifier: Apache-2.0
"""One run in two processes, which exchange gradients as GPUs would."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from vllm_clover2.model.weights import load_head
from vllm_clover2.train import loop
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.loop import train


def launch(config: TrainConfig) -> None:
    options: list[str] = []
    for name, value in config.model_dump(mode="json", exclude_unset=True).items():
        options += ["--" + name.replace("_", "-"), str(value)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--standalone", "-m", "vllm_clover2.cli", "train", *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_one_head_and_resume(tiny_config: TrainConfig) -> None:
    config = tiny_config.model_copy(
        update={
            "steps": 80,
            "ema_decay": 0.9,
            "hidden_cache": tiny_config.output / "h",
        }
    )
    config = TrainConfig(**config.model_dump(exclude_unset=True))
    launch(config)
    rows = list(csv.DictReader((config.output / "metrics.csv").open()))
    # Every step is logged once, by one process.
    assert [int(float(row["step"])) for row in rows] == list(range(4, 81, 4))
    assert float(rows[-1]["ploss_0"]) < float(rows[0]["ploss_0"]) - 0.5
    head = load_head(config.output / "head")
    assert head.config.training["settings"]["steps"] == 80

    launch(TrainConfig(**config.model_dump(exclude_unset=True) | {"steps": 82}))
    record = json.loads((config.output / "run.json").read_text())
    assert len(record["earlier_commands"]) == 1
    names = sorted(path.name for path in (config.output / "checkpoints").iterdir())
    assert names[-1] == "step-0000082"


def join_group(store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def test_training_leaves_its_process_group(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a process may abort at its end, and torchrun then stops the others."""
    settings = tiny_config.model_dump(exclude_unset=True)
    settings |= {"steps": 2, "warmup_steps": 0}
    stores = iter([tmp_path / "finished", tmp_path / "refused"])
    # Joins where accelerate does under torchrun: while the trainer is made.
    monkeypatch.setattr(loop, "set_seed", lambda seed: join_group(next(stores)))
    train(TrainConfig(**settings))
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="seed"):
        train(TrainConfig(**settings | {"seed": 7}))
    assert not dist.is_initialized()
    assert not list(stores)


def test_training_keeps_a_group_of_others(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    """An engine of vLLM in this process has one, and fails without it."""
    join_group(tmp_path / "store")
    settings = tiny_config.model_dump(exclude_unset=True)
    try:
        train(TrainConfig(**settings | {"steps": 2, "warmup_steps": 0}))
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()
