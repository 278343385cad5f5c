# SPDX-License-Identifier: Apache-2.0
"""What the size of a head's draft vocabulary costs and yields.

    python examples/draft_vocabulary.py --answers FILE --held-out FILE

A draft scores only the most frequent tokens of the target's answers. Which ones is no
part of the training's result: this script gives one head other sizes, counts what they
cover, replays the held-out greedy answers and times the growth of a tree, in one
thread and with vLLM's packed weights, as vLLM's worker grows it on a small CPU.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from vllm_clover2.heads import SHIPPED
from vllm_clover2.integration.draft_model import serving_product
from vllm_clover2.integration.drafter import median_seconds
from vllm_clover2.model import Clover2Model
from vllm_clover2.model.weights import load_head
from vllm_clover2.train.architectures import ARCHITECTURES
from vllm_clover2.train.clover2 import HeadDraft
from vllm_clover2.train.data import AnswerSet, read_answers
from vllm_clover2.train.evaluate import evaluate_head
from vllm_clover2.train.hidden import Target
from vllm_clover2.train.start import frequent_tokens
from vllm_clover2.tree import DynamicTree, grow_dynamic

TREES = ["paper", "dynamic:60"]
REPEATS = 30


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option("--target", default="build/SmolLM2-135M-Instruct")
    option("--head", type=Path, default=SHIPPED / "smollm2-135m-instruct")
    option("--answers", type=Path, required=True, help="to count tokens in")
    option("--held-out", type=Path, required=True, help="greedy, to measure on")
    option("--sizes", type=int, nargs="+", default=[4096, 8192, 12288, 16384, 49152])
    return parser.parse_args()


def output_counts(answers: AnswerSet, vocab_size: int) -> np.ndarray:
    """[vocab_size] int64: how often each id occurs in the outputs."""
    return answers.output_counts(vocab_size, np.arange(len(answers)))


@torch.inference_mode()
def growth_milliseconds(
    model: Clover2Model,
    lm_head: torch.Tensor,  # [V, H]
    vocabularies: list[torch.Tensor],  # [size] int64 each
) -> list[float]:
    """Median times of growing one request's dynamic tree of 25 nodes."""
    model.recurrent.fuse(serving_product)
    drafts = []
    for ids in vocabularies:
        model.draft_vocab_ids = ids
        drafts.append(HeadDraft(model, lm_head, serving_product))
    tree = DynamicTree(25)
    hidden = torch.randn(1, model.config.hidden_size, dtype=lm_head.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    grow = [functools.partial(grow_dynamic, draft, hidden, tree) for draft in drafts]
    seconds = median_seconds(grow, rounds=REPEATS)
    torch.set_num_threads(threads)
    return [1e3 * time for time in seconds]


def main() -> None:
    """Print a row per size."""
    args = parse_args()
    dtype = torch.bfloat16
    target = Target.load(args.target, dtype, torch.device("cpu"))
    vocab_size = target.config.vocab_size
    counts = output_counts(read_answers(args.answers, vocab_size), vocab_size)
    held_out = read_answers(args.held_out, vocab_size)
    held_counts = output_counts(held_out, vocab_size)
    model = load_head(args.head, dtype).eval()
    table = Table(title=f"Draft vocabularies of {args.head.name}")
    for column in ("size", "covered", "held out", *TREES, "ms to grow 25 nodes"):
        table.add_column(column, justify="right")
    vocabularies = [frequent_tokens(counts, size) for size in args.sizes]
    rows = []
    for ids in vocabularies:
        model.draft_vocab_ids = ids
        accepted = evaluate_head(
            model,
            ARCHITECTURES["clover2"],
            target,
            held_out,
            np.arange(len(held_out)),
            TREES,
        )
        rows.append(
            [
                f"{len(ids):,}",
                *(f"{c[ids].sum() / c.sum():.1%}" for c in (counts, held_counts)),
                *(f"{accepted[tree]['accepted_per_step']:.3f}" for tree in TREES),
            ]
        )
    times = growth_milliseconds(model, target.lm_head, vocabularies)
    for row, milliseconds in zip(rows, times, strict=True):
        table.add_row(*row, f"{milliseconds:.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
