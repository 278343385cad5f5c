# SPDX-License-Identifier: Apache-2.0
"""The card of a trained head: `README.md` in its folder, with the hub's metadata."""

import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from vllm_clover2.train.config import TrainConfig

__all__ = ["card"]

_NAMES = {"clover2": "Clover-2", "eagle1": "EAGLE-1"}


def card(
    config: TrainConfig,
    head: Any,  # the draft's `config`, with `target` and `training`
    validations: list[dict[str, Any]],  # of the run, see `Trainer.validate`
) -> str:
    """What it was trained for and on, how well it does there, and how to serve it."""
    kind, target = _NAMES[config.architecture], head.target["name"]
    method = "clover2" if config.architecture == "clover2" else "eagle"
    metadata = ModelCardData(
        # A folder of this machine means nothing on the hub.
        base_model=None if Path(config.target).is_dir() else config.target,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", method],
    )
    training = head.training
    data, size = training["data"], head.draft_vocab_size or head.vocab_size
    options: dict[str, Any] = {"method": method, "model": "THIS_HEAD"}
    if method == "eagle":
        options["num_speculative_tokens"] = 3
    rows = {
        "target": f"{target}, {head.target.get('num_hidden_layers')} layers, "
        f"hidden size {head.hidden_size}",
        "draft vocabulary": f"{size:,} tokens, {training['draft_vocab_coverage']:.1%} "
        "of those in the answers",
        "answers": f"{data['num_train']:,} trained on, {data['num_validation']:,} held "
        f"out; sha256 {data['answers_sha256']}",
    }
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {kind} head for {target}\n",
        "A draft for speculative decoding; the text served stays the target's.\n",
        f"    vllm serve TARGET --speculative-config '{json.dumps(options)}'\n",
        "| | |\n| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        f"\nTrained by\n\n    {shlex.join(training['command'])}\n",
        "`config.json` has all settings, versions and hashes under `training`, and the",
        "runs before this one under `earlier_commands` and `started_from`.",
    ]
    if validations:
        lines.append("\nHeld-out answers, by draft step:\n")
        lines.append("| step | cross entropy | top-1 |\n| --- | --- | --- |")
    for one in validations:
        losses, agreement = _shown(one["ploss"]), _shown(one["agreement"])
        lines.append(f"| {one['step']} | {losses} | {agreement} |")
    return "\n".join(lines) + "\n"


def _shown(values: list[float]) -> str:
    return " / ".join(f"{value:.3f}" for value in values)
