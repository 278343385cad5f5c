# SPDX-License-Identifier: Apache-2.0
"""The training loop: one process or many, resumable inside an epoch."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vllm_clover2.model import Packing
from vllm_clover2.train.card import card
from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.data import (
    Batch,
    next_in_text,
    pack,
    read_answers,
    token_budget_batches,
)
from vllm_clover2.train.hidden import HiddenStateCache, Target, TargetStates
from vllm_clover2.train.losses import (
    DraftLoss,
    LossRows,
    LossWeights,
    OnPolicy,
    draft_loss,
    label_agreement,
)
from vllm_clover2.train.optimizers import lr_factor, make_optimizers
from vllm_clover2.train.run import RunDirectory
from vllm_clover2.train.start import start_of

__all__ = ["Trainer", "train"]


class Trainer:
    """Holds what a run consists of; `run` does the steps."""

    def __init__(self, config: TrainConfig) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self.config = config
        self.accelerator = Accelerator(
            mixed_precision="bf16" if config.precision == "bf16" else "no"
        )
        set_seed(config.seed)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.target = Target.load(config.target, dtype, self.accelerator.device)
        self.target.read_layers(config.aux_hidden_state_layers)
        self.answers = read_answers(
            config.answers, self.target.config.vocab_size, config.max_length
        )
        chosen = self.answers.select(config.max_answers, config.temperatures)
        train_part, val_part = self.answers.split(config.validation_fraction)
        self.train_indices = np.intersect1d(train_part, chosen)
        self.val_indices = np.intersect1d(val_part, chosen)
        if not len(self.val_indices):
            raise ValueError(
                f"no answer fell into the validation share "
                f"{config.validation_fraction}; give more answers or a larger share"
            )
        self.cache = None
        if config.hidden_cache is not None:
            with self.accelerator.main_process_first():  # it makes the files
                self.cache = HiddenStateCache(
                    config.hidden_cache, self.answers, self.target
                )
        self.start = start_of(config, self.target, self.answers, self.train_indices)
        self.draft = self.start.draft
        self._prepare()
        self.run_directory = RunDirectory(config.output)
        self.step = 0

    def _prepare(self) -> None:
        """Model, optimisers and schedules, as accelerate has them."""
        config = self.config
        model = self.start.architecture.trainable(self.draft)
        optimizers = make_optimizers(model, self.start.gains, config)
        self.model = self.accelerator.prepare(model)
        self.optimizers = [self.accelerator.prepare(one) for one in optimizers]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: lr_factor(step, config))
            for one in optimizers
        ]
        self.accelerator.register_for_checkpointing(*self.schedulers)
        self.average: AveragedModel | None = None
        if config.ema_decay is not None:
            self.average = AveragedModel(
                self.draft, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)
            )
            self.accelerator.register_for_checkpointing(self.average)

    # --- data -------------------------------------------------------------

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """This process's batches of one epoch; all processes have equally many."""
        batches = token_budget_batches(
            self.answers.lengths,
            self.train_indices,
            self.config.max_tokens,
            seed=self.config.seed * 1_000_003 + epoch,
        )
        world = self.accelerator.num_processes
        usable = max(world, len(batches) // world * world)
        mine = batches[:usable][self.accelerator.process_index :: world]
        if not mine:
            raise ValueError(
                f"{len(batches)} batches are too few for {world} processes; lower "
                "max_tokens or use fewer processes"
            )
        return mine

    def _batches_from(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Batches from optimiser step `step` on, with their epoch; endless."""
        epoch = 0
        while True:
            batches = self._epoch(epoch)
            if step < len(batches):
                for indices in batches[step:]:
                    yield epoch, pack(self.answers, indices, self.config.learn_prompts)
            step = max(0, step - len(batches))
            epoch += 1

    def _states(self, batch: Batch) -> TargetStates:
        if self.cache is None:
            # Made in inference mode, where autograd may not save tensors.
            input_ids = batch.input_ids.to(self.target.lm_head.device)
            hidden = self.target.hidden(input_ids, batch.lengths).clone()
        else:
            hidden = self.cache.fetch(batch).to(self.target.lm_head)
        return self.target.states_of(hidden)

    # --- steps --------------------------------------------------------------

    def _loss(self, batch: Batch, validating: bool, count_agreed: bool) -> DraftLoss:
        config, device = self.config, self.accelerator.device
        states = self._states(batch)
        next_ids = next_in_text(batch.input_ids.to(device), batch.lengths)
        agreement = on_policy = None
        if config.label_mask:
            with torch.no_grad():
                agreement = label_agreement(
                    states.post_norm, next_ids, self.target.lm_head
                )
        rows = LossRows.build(
            batch.loss_mask.to(device),
            batch.lengths,
            config.num_draft_steps,
            agreement,
            later_share=1.0 if validating else config.later_share,
        )
        if config.on_policy_top_k is not None and not validating:
            after = next_in_text(next_ids, batch.lengths)[rows.label_position]
            on_policy = OnPolicy(self.start.index[after], config.on_policy_top_k)
        inputs = states
        if config.feature_noise and not validating:
            # The labels stay as they are: only what the draft reads is disturbed.
            noise = torch.rand_like(states.post_norm).mul_(2).sub_(1)
            noisy = states.post_norm + config.feature_noise * noise
            inputs = states._replace(post_norm=noisy)
        outputs = self.model(
            inputs,
            self.start.architecture.embeddings(self.target)[next_ids],
            Packing(batch.lengths, config.attention == "xformers"),
            rows,
        )
        return draft_loss(
            outputs,
            next_in_text(states.post_norm, batch.lengths),
            rows,
            self.start.lm_head,
            LossWeights(config.value_weight, config.prob_weight, config.step_decay),
            on_policy=on_policy,
            count_agreed=count_agreed,
            compiled=config.compile_loss,
        )

    def _train_step(self, batch: Batch, count_agreed: bool) -> DraftLoss:
        result = self._loss(batch, validating=False, count_agreed=count_agreed)
        self.accelerator.backward(result.loss)
        norm = self.accelerator.clip_grad_norm_(
            self.model.parameters(), self.config.clip_norm
        )
        if not (bool(torch.isfinite(result.loss)) and bool(torch.isfinite(norm))):
            raise RuntimeError(
                f"loss {float(result.loss.detach())} or gradient norm {float(norm)} is "
                f"not finite at step {self.step}; nothing was updated. Lower "
                "learning_rate or check the target's hidden states; the last good "
                f"checkpoint is {self.run_directory.latest()}"
            )
        for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.draft)
        return result

    def _served_draft(self) -> Any:
        """The weights that are evaluated and shipped."""
        return self.draft if self.average is None else self.average.module

    @torch.no_grad()
    def validate(self) -> dict[str, list[float]]:
        """Losses and top-1 agreement per step on the held-out answers."""
        training = self.model
        self.model = self.accelerator.prepare_model(
            self.start.architecture.trainable(self._served_draft()),
            evaluation_mode=True,
        )
        totals = torch.zeros(
            3, self.config.num_draft_steps, device=self.accelerator.device
        )
        batches = token_budget_batches(
            self.answers.lengths, self.val_indices, self.config.max_tokens, None
        )
        world = self.accelerator.num_processes
        try:
            for indices in batches[self.accelerator.process_index :: world]:
                result = self._loss(
                    pack(self.answers, indices), validating=True, count_agreed=True
                )
                assert result.agreed is not None
                ce = result.ploss * (result.weight + 1.0)
                totals += torch.stack([ce, result.agreed, result.weight])
        finally:
            self.model = training
        totals = self.accelerator.reduce(totals)
        return {
            "ploss": (totals[0] / totals[2]).tolist(),
            "agreement": (totals[1] / totals[2]).tolist(),
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        latest = self.run_directory.latest()
        if latest is None:
            return
        try:
            self.accelerator.load_state(str(latest))
        except Exception as error:  # each file format raises its own types
            raise ValueError(
                f"checkpoint {latest} cannot be loaded into this model ({error}). It "
                "is damaged or of another shape: delete it to fall back to an older "
                "one, or give the run another output folder"
            ) from error
        self.step = int(latest.name.removeprefix("step-"))
        if self.accelerator.is_main_process:
            self.run_directory.rewind(self.step)

    def save(self) -> None:
        self.run_directory.save(
            self.accelerator, self.step, self.config.keep_checkpoints
        )
        if self.accelerator.is_main_process:
            self.start.architecture.save(
                self._served_draft(), self.run_directory.head, torch.bfloat16
            )

    def run(self) -> Path:
        """Train to `config.steps`, or for `config.max_minutes`; the head's folder."""
        if self.accelerator.is_main_process:
            self._record()
        self.resume()
        begun = self.step
        self._train()
        if self.accelerator.is_main_process:
            self.run_directory.plot()
            if self.step > begun:
                self._write_card()
        return self.run_directory.head

    def _record(self) -> None:
        """Write down what this run is, in its folder and in its head."""
        data = {
            "answers_sha256": self.answers.fingerprint,
            "target": self.target.fingerprint,
            "num_answers": len(self.answers),
            "num_train": len(self.train_indices),
            "num_validation": len(self.val_indices),
        }
        settings = self.config.model_dump(mode="json")
        record = self.run_directory.record(settings, data)
        coverage = {"draft_vocab_coverage": round(self.start.coverage, 4)}
        if self.start.earlier is not None:
            record["started_from"] = self.start.earlier
        self.draft.config.training = record | coverage
        if self.average is not None:
            self.average.module.config = self.draft.config

    def _write_card(self) -> None:
        validations = self.run_directory.validations()
        text = card(self.config, self.draft.config, validations)
        (self.run_directory.head / "README.md").write_text(text, "utf-8")

    def _train(self) -> None:
        config = self.config
        columns = (*Progress.get_default_columns()[:3], TimeRemainingColumn())
        with Progress(
            *columns,
            TextColumn("{task.fields[status]}"),
            disable=not self.accelerator.is_main_process,
        ) as progress:
            task = progress.add_task(
                "training", total=config.steps, completed=self.step, status=""
            )
            begun = started = time.monotonic()
            for epoch, batch in self._batches_from(self.step):
                if self.step >= config.steps:
                    break
                logged = (self.step + 1) % config.log_every == 0
                result = self._train_step(batch, count_agreed=logged)
                self.step += 1
                progress.update(task, completed=self.step)
                if logged:
                    seconds = (time.monotonic() - started) / config.log_every
                    status = self._log(result, epoch, seconds)
                    progress.update(task, status=status)
                    started = time.monotonic()
                self._periodic()
                if logged and self.step < config.steps and self._out_of_time(begun):
                    self.save()
                    self.accelerator.print(
                        f"stopped after step {self.step} of {config.steps}; the same "
                        "command goes on from there"
                    )
                    break

    def _out_of_time(self, begun: float) -> bool:
        """Whether any process has trained for `max_minutes`: all stop together."""
        if self.config.max_minutes is None:
            return False
        over = time.monotonic() - begun > 60 * self.config.max_minutes
        votes = torch.tensor(float(over), device=self.accelerator.device)
        return bool(self.accelerator.reduce(votes) > 0)

    def _periodic(self) -> None:
        """Checkpoint and validate when due, and always after the last step."""
        last = self.step == self.config.steps
        if last or self.step % self.config.save_every == 0:
            self.save()
        if last or self.step % self.config.evaluate_every == 0:
            result = self.validate()
            if self.accelerator.is_main_process:
                self.run_directory.log_validation(self.step, result)
                shown = " ".join(f"{share:.3f}" for share in result["agreement"])
                self.accelerator.print(f"step {self.step}: validation top-1 {shown}")

    def _log(self, result: DraftLoss, epoch: int, seconds: float) -> str:
        assert result.agreed is not None
        agreement = (result.agreed / result.weight.clamp(min=1)).tolist()
        row = {
            "step": float(self.step),
            "epoch": float(epoch),
            "lr": self.schedulers[0].get_last_lr()[0],
            "loss": float(result.loss.detach()),
            "seconds_per_step": seconds,
        }
        for name, values in (
            ("ploss", result.ploss.tolist()),
            ("vloss", result.vloss.tolist()),
            ("top1", agreement),
        ):
            row |= {f"{name}_{step}": value for step, value in enumerate(values)}
        if self.accelerator.is_main_process:
            self.run_directory.log(row)
        shown = " ".join(f"{share:.2f}" for share in agreement)
        return f"loss {row['loss']:.3f} top-1 {shown}"


def train(config: TrainConfig) -> Path:
    """Train a draft head; returns the folder that holds it.

    Under torchrun this joins a process group and leaves it again, so it is a process's
    last work. A group that was there before, an engine's for example, stays.
    """
    joins = not torch.distributed.is_initialized()
    trainer = Trainer(config)
    try:
        head = trainer.run()
        trainer.accelerator.wait_for_everyone()
    finally:
        # A process that ends while its group's threads run may be aborted.
        if joins:
            trainer.accelerator.end_training()
    return head
