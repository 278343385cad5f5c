# SPDX-License-Identifier: Apache-2.0
"""Train short runs that differ in one setting each, and print what it changes.

    python examples/ablation.py --answers FILE --held-out FILE [--steps 100]

Every variant is trained with every seed on the same answers, in the same batches, and
replayed on held-out greedy answers, which must not be those of the evaluation set.
Finished runs are kept under ``--output`` and not repeated, unfinished ones go on from a
checkpoint of every 20 steps. With ``--start-from`` a head is trained further, at lower
rates; keep one ``--output`` a head.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_clover2.train.config import EvaluateConfig, TrainConfig
from vllm_clover2.train.evaluate import evaluate
from vllm_clover2.train.loop import train

BASE: dict[str, Any] = {
    "draft_vocab_size": 8192,
    "num_draft_steps": 3,
    "init_layers": "first",
    "learning_rate": 1.5e-3,
    "muon_lr": 5e-3,
    "warmup_steps": 10,
    "decay_fraction": 0.5,
    "ema_decay": 0.95,
    "value_weight": 1.0,
    "step_decay": 0.8,
    "max_tokens": 2048,
    "compile_loss": True,
}
# With --start-from: a trained head needs no large steps.
GOING_ON: dict[str, Any] = {
    "learning_rate": 3e-4,
    "muon_lr": 1e-3,
    "decay_fraction": 1.0,
    "ema_decay": 0.9,
    "learn_prompts": True,
    "max_tokens": 1024,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    # Close to the best of eight tried for 60 steps: the target's first layers, which
    # help Clover-2, hurt it.
    "EAGLE-1": {
        "architecture": "eagle1",
        "num_layers": 1,
        "num_draft_steps": 1,
        "init_layers": "random",
        "init_recurrence": "reference",
        "muon_lr": 2.5e-3,
        "value_weight": 10.0,
    },
    "1 draft step": {"num_draft_steps": 1},
    "5 draft steps": {"num_draft_steps": 5},
    "on-policy, top 8": {"on_policy_top_k": 8},
    "prompts too": {"learn_prompts": True},
    "greedy answers only": {"temperatures": [0.0]},
    "AdamW alone": {"muon_lr": None},
    "half the rates": {"learning_rate": 7.5e-4, "muon_lr": 2.5e-3},
    "no average": {"ema_decay": None},
    "no smooth L1": {"value_weight": 0.0},
    "the original's weights": {"value_weight": 10.0, "step_decay": 0.7},
    "the original's start": {"init_recurrence": "reference"},
    "inner layers": {"aux_hidden_state_layers": [3, 16]},
    "a third of later rows": {"later_share": 0.34},
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--target", default="build/SmolLM2-135M-Instruct")
    option("--answers", type=Path, required=True, help="to train on")
    option("--held-out", type=Path, required=True, help="greedy, to measure on")
    option("--output", type=Path, default=Path("build/ablation"))
    option("--steps", type=int, default=100)
    option("--seeds", type=int, nargs="+", default=[0, 1])
    option("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    option("--trees", nargs="+", default=["chain:3", "paper", "dynamic:60"])
    option("--hidden-cache", type=Path, help="of the target's states, for all runs")
    option("--threads", type=int)
    option("--start-from", type=Path, help="head to go on from, at lower rates")
    option("--max-answers", type=int, help="train on the first answers only")
    option("--precision", default="bf16", choices=["bf16", "fp32"])
    return parser.parse_args()


def run(args: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    """One variant with one seed: train and replay, or read what was found before."""
    name = "".join(c if c.isalnum() else "-" for c in variant)
    further = "further-" if args.start_from else ""
    folder = args.output / f"{further}{name}-{args.steps}-{seed}"
    result_path = folder / "result.json"
    if result_path.exists():
        return json.loads(result_path.read_text())
    base = {"precision": args.precision} | BASE
    if args.start_from:
        base |= GOING_ON
    config = TrainConfig(
        target=args.target,
        answers=args.answers,
        output=folder,
        steps=args.steps,
        seed=seed,
        hidden_cache=args.hidden_cache,
        threads=args.threads,
        start_from=args.start_from,
        max_answers=args.max_answers,
        evaluate_every=args.steps,
        save_every=20,
        **(base | VARIANTS[variant]),
    )
    start = time.monotonic()
    head = train(config)
    seconds = time.monotonic() - start
    replayed = evaluate(
        EvaluateConfig(
            target=args.target,
            head=head,
            answers=args.held_out,
            trees=args.trees,
            threads=args.threads,
            precision=args.precision,
        )
    )
    validation = json.loads((folder / "metrics.json").read_text())[-1]
    result = {
        "cross_entropy": validation["ploss"][0],
        "accepted": {tree: replayed[tree]["accepted_per_step"] for tree in args.trees},
        "seconds": seconds,
    }
    result_path.write_text(json.dumps(result, indent=1))
    return result


def mean_and_error(values: list[float]) -> str:
    """Mean over the seeds, and its standard error where there are several."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    """Run all variants, then print the table."""
    args = parse_args()
    columns = ("cross entropy, step 1", *(f"accepted, {tree}" for tree in args.trees))
    table = Table(title=f"{args.steps} steps, seeds {args.seeds}")
    table.add_column("variant")
    for column in (*columns, "seconds"):
        table.add_column(column, justify="right")
    for variant in args.variants:
        results = [run(args, variant, seed) for seed in args.seeds]
        figures = [[result["cross_entropy"] for result in results]]
        figures += [
            [result["accepted"][tree] for result in results] for tree in args.trees
        ]
        seconds = statistics.median(result["seconds"] for result in results)
        table.add_row(variant, *map(mean_and_error, figures), f"{seconds:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
