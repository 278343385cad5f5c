# SPDX-License-Identifier: Apache-2.0
"""Typed settings of a training run; the command line is generated from them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["EvaluateConfig", "TrainConfig"]


class TrainConfig(BaseModel):
    """Everything that decides a run's result, plus where things lie."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(description="target model: a folder or a hub name")
    answers: Path = Field(description="answers of the target (.jsonl or .jsonl.gz)")
    output: Path = Field(description="run directory, made or resumed")

    architecture: Literal["clover2", "eagle1"] = Field(
        "clover2", description="kind of draft; EAGLE-1 is there to compare with"
    )
    start_from: Path | None = Field(
        None, description="train this head further instead of a new one"
    )
    num_layers: int = Field(2, ge=1, description="layers of the augmenting block")
    num_draft_steps: int = Field(5, ge=1, description="depth to train for")
    draft_vocab_size: int | None = Field(
        None, description="score only the target's most frequent tokens; unset: all"
    )
    aux_hidden_state_layers: list[int] | None = Field(
        None, description="the head reads states after so many target layers too"
    )
    rope_theta: float | None = Field(None, description="unset: the target's")
    init_layers: Literal["last", "first", "random"] = Field(
        "last", description="target layers that the augmenting layers start from"
    )
    init_recurrence: Literal["scaled", "reference"] = Field(
        "scaled", description="add tokens at the size of the states, or as the original"
    )

    steps: int = Field(2000, ge=1, description="optimiser steps in all")
    max_tokens: int = Field(4096, ge=2, description="tokens a batch")
    max_length: int = Field(2048, ge=4, description="longer answers are cut")
    learning_rate: float = Field(1e-3, gt=0)
    muon_lr: float | None = Field(
        None, gt=0, description="train the matrices with Muon at this rate"
    )
    warmup_steps: int = Field(100, ge=0)
    decay_fraction: float = Field(
        1.0, gt=0, le=1, description="last share of the run with cosine decay"
    )
    final_lr_fraction: float = Field(0.02, ge=0, le=1)
    weight_decay: float = Field(0.01, ge=0)
    beta2: float = Field(0.95, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0, description="gradient norm limit")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="average the weights; unset: off"
    )
    value_weight: float = Field(10.0, ge=0, description="weight of smooth L1")
    prob_weight: float = Field(1.0, ge=0, description="weight of cross entropy")
    step_decay: float = Field(0.7, gt=0, description="loss factor per draft step")
    later_share: float = Field(
        1.0, gt=0, le=1, description="share of positions that later steps are taken at"
    )
    label_mask: bool = Field(
        False, description="skip continuations the target would not choose"
    )
    feature_noise: float = Field(
        0.0,
        ge=0,
        description="EAGLE-1: add uniform noise up to this size to its input features",
    )
    on_policy_top_k: int | None = Field(
        None,
        ge=1,
        description="train later steps only where the draft's own top k hold the text",
    )
    learn_prompts: bool = Field(
        False, description="imitate the target on the prompts' tokens too"
    )
    max_answers: int | None = Field(
        None, ge=1, description="train on the first answers of the file only"
    )
    temperatures: list[float] | None = Field(
        None, min_length=1, description="use answers sampled at these; unset: all"
    )
    validation_fraction: float = Field(0.02, gt=0, lt=0.5)
    seed: int = 0

    precision: Literal["bf16", "fp32"] = "bf16"
    hidden_cache: Path | None = Field(
        None, description="keep the target's hidden states there; unset: recompute"
    )
    attention: Literal["sdpa", "xformers"] = Field(
        "sdpa", description="of packed answers; xformers: one CUDA kernel for all"
    )
    compile_loss: bool = Field(False, description="torch.compile the loss")
    threads: int | None = Field(None, ge=1, description="CPU threads")
    max_minutes: float | None = Field(
        None, gt=0, description="stop after so long; the same command goes on"
    )
    log_every: int = Field(20, ge=1)
    evaluate_every: int = Field(250, ge=1)
    save_every: int = Field(250, ge=1)
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps ({self.steps}), got "
                f"{self.warmup_steps}"
            )
        if self.attention == "xformers" and find_spec("xformers") is None:
            raise ValueError(
                "attention=xformers needs the package xformers, which is not "
                "installed; install it (CUDA only) or choose sdpa"
            )
        if self.architecture == "eagle1" and (
            self.num_layers != 1 or self.num_draft_steps != 1
        ):
            raise ValueError(
                "EAGLE-1 has one layer and is trained for one step: num_layers and "
                f"num_draft_steps must be 1, got {self.num_layers} and "
                f"{self.num_draft_steps}"
            )
        if self.aux_hidden_state_layers and self.architecture != "clover2":
            raise ValueError(
                "aux_hidden_state_layers belong to architecture clover2, found "
                f"{self.architecture}; leave them out"
            )
        if self.feature_noise and self.architecture != "eagle1":
            raise ValueError(
                f"feature_noise belongs to architecture eagle1, found "
                f"{self.architecture}; set it to 0"
            )
        if self.value_weight == 0 and self.prob_weight == 0:
            raise ValueError("value_weight and prob_weight must not both be 0")
        return self


class EvaluateConfig(BaseModel):
    """Settings of an evaluation, by offline replay or served by vLLM."""

    model_config = ConfigDict(extra="forbid")

    target: str = Field(description="target model: a folder or a hub name")
    head: Path = Field(description="folder of the head")
    answers: Path = Field(description="greedy answers of the target")
    trees: list[str] = Field(
        ["chain:5", "paper", "dynamic:25", "dynamic:60"],
        min_length=1,
        description="chain:DEPTH, paper (25 nodes), dynamic:NODES[:DEPTH]",
    )
    max_answers: int | None = Field(None, ge=1, description="first answers only")
    max_length: int = Field(4096, ge=4, description="longer answers are cut")
    max_tokens: int = Field(16384, ge=2, description="tokens a batch")
    precision: Literal["bf16", "fp32"] = "bf16"
    threads: int | None = Field(None, ge=1, description="CPU threads")
    output: Path | None = Field(None, description="JSON file to write")
    served: bool = Field(
        False, description="answer the prompts again with vLLM instead of replaying"
    )
    concurrency: int = Field(1, ge=1, description="served: requests at a time")
    kv_cache_gib: float = Field(2.0, gt=0, description="served: the KV cache in GiB")
