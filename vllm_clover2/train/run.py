# SPDX-License-Identifier: Apache-2.0
"""The run directory: provenance, metrics, checkpoints."""

import csv
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vllm_clover2.records import command, git_commit, versions, write_json
from vllm_clover2.train.resuming import refuse_changes

__all__ = ["RunDirectory"]

# Settings that a resumed run may change: they neither alter what the finished steps
# meant nor the order of the data.
_FREE_SETTINGS = frozenset(
    {
        "target",  # paths may move; hashes of their content tell
        "answers",
        "output",
        "hidden_cache",
        "steps",
        "learning_rate",
        "muon_lr",
        "warmup_steps",
        "decay_fraction",
        "final_lr_fraction",
        "weight_decay",
        "clip_norm",
        "attention",
        "compile_loss",
        "threads",
        "max_minutes",
        "log_every",
        "evaluate_every",
        "save_every",
        "keep_checkpoints",
    }
)

_PACKAGES = ("vllm-clover2", "torch", "transformers", "accelerate", "safetensors")


class RunDirectory:
    """Files of one run:

    run.json        command, versions, seed, data hashes, settings
    metrics.csv     one row per logged training step
    metrics.json    validation results, by step
    metrics.png     losses and agreement, drawn at the end
    checkpoints/    step-NNNNNNN folders, each complete or absent
    head/           the draft in the format that is served, and its card
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.head = folder / "head"
        self._validations = folder / "metrics.json"
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    def record(self, settings: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Write run.json; a resumed run must be the same run."""
        path = self.folder / "run.json"
        history = []
        if path.exists():
            previous = json.loads(path.read_text())
            remedy = "give this run its own output folder"
            what = f"the run in {self.folder}"
            refuse_changes(what, previous["data"], data, remedy)
            fixed = [
                {key: value for key, value in one.items() if key not in _FREE_SETTINGS}
                for one in (previous["settings"], settings)
            ]
            refuse_changes(what, *fixed, remedy)
            history = [*previous.get("earlier_commands", []), previous["command"]]
        record = {
            "command": command(),
            "earlier_commands": history,
            "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
            "git": git_commit(),
            "data": data,
            "settings": settings,
        }
        write_json(path, record)
        return record

    def rewind(self, step: int) -> None:
        """Drop logged rows after `step`: the steps that are now taken again."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        header, *rows = path.read_text().splitlines()
        kept = [row for row in rows if float(row.split(",", 1)[0]) <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("\n".join([header, *kept]) + "\n")
        os.replace(partial, path)

    def log(self, row: dict[str, float]) -> None:
        """Append to metrics.csv; the first row decides the columns."""
        path = self.folder / "metrics.csv"
        new = not path.exists()
        with path.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow({key: f"{value:.6g}" for key, value in row.items()})

    def log_validation(self, step: int, result: dict[str, Any]) -> None:
        earlier = [one for one in self.validations() if one["step"] < step]
        write_json(self._validations, [*earlier, {"step": step, **result}])

    def validations(self) -> list[dict[str, Any]]:
        """What was logged of them, by step."""
        path = self._validations
        return json.loads(path.read_text()) if path.exists() else []

    def plot(self) -> None:
        """Draw metrics.csv as metrics.png; does nothing before the first log."""
        path = self.folder / "metrics.csv"
        if not path.exists():
            return
        import matplotlib

        matplotlib.use("Agg")  # no display is needed
        from matplotlib import pyplot

        with path.open(newline="") as stream:
            rows = [
                {key: float(value) for key, value in row.items()}
                for row in csv.DictReader(stream)
            ]
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
        for axis, prefix, title in (
            (axes[0], "ploss_", "cross entropy by draft step"),
            (axes[1], "top1_", "top-1 agreement by draft step"),
        ):
            for name in (key for key in rows[0] if key.startswith(prefix)):
                steps = [row["step"] for row in rows]
                label = f"step {name.removeprefix(prefix)}"
                axis.plot(steps, [row[name] for row in rows], label=label)
            axis.set(title=title, xlabel="optimiser step")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.tight_layout()
        figure.savefig(self.folder / "metrics.png", dpi=110)
        pyplot.close(figure)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = sorted(self.checkpoints.glob("step-*"))
        return found[-1] if found else None

    def save(self, accelerator: Accelerator, step: int, keep: int) -> None:
        """Write a checkpoint beside the others, then give it its final name.

        A failure (a full disk, say) leaves the previous checkpoints as they are.
        """
        final = self.checkpoints / f"step-{step:07d}"
        partial = self.checkpoints / f".partial-{step:07d}"
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(partial))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(partial, final)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, (OSError, RuntimeError)):
                raise RuntimeError(
                    f"cannot save the checkpoint of step {step} ({error}); the last "
                    f"good one is {self.latest()}"
                ) from error
            raise
        if accelerator.is_main_process:
            for old in sorted(self.checkpoints.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
