# SPDX-License-Identifier: Apache-2.0
"""What tests of both architectures do with whole training runs."""

from pathlib import Path

import pytest

from vllm_clover2.train.config import EvaluateConfig, TrainConfig
from vllm_clover2.train.evaluate import evaluate
from vllm_clover2.train.loop import Trainer

# Accepted tokens a step in a chain of 3: from 0.0 before training to about 2.0.
ACCEPTANCE_FLOOR = 1.0


def changed(config: TrainConfig, **values: object) -> TrainConfig:
    return TrainConfig(**{**config.model_dump(), **values})


def acceptance(config: TrainConfig, head: Path, tree: str = "chain:3") -> float:
    """Accepted tokens a step on the answers that ``config`` trains on."""
    result = evaluate(
        EvaluateConfig(
            target=config.target,
            head=head,
            answers=config.answers,
            trees=[tree],
            precision="fp32",
        )
    )
    return float(result[tree]["accepted_per_step"])


def run_until(trainer: Trainer, step: int) -> None:
    """Run, and be interrupted after a logged step as by a user."""
    log = trainer._log  # noqa: SLF001

    def interrupting(*arguments: object) -> str:
        if trainer.step == step:
            raise KeyboardInterrupt
        return log(*arguments)  # type: ignore[arg-type]

    trainer._log = interrupting  # type: ignore[method-assign] # noqa: SLF001
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
