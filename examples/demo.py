# SPDX-License-Identifier: Apache-2.0
"""Answer a dozen prompts without and with Clover-2, in one run, and compare.

    python examples/demo.py [--concurrency 8] [--prompts FILE] [--methods none clover2]

Each method runs in an engine of its own, in a fresh process; they start side by side,
and do not compile the target, which would take minutes (``--compile``). Rounds of the
methods take turns, so that a busy machine is busy for all of them; figures are medians
over the rounds. Tables go to the terminal, all figures to ``build/demo.json``. Where
the output is no terminal, every stage is a line instead of a bar that moves.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo_report import METHODS, show, summarise
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from vllm_clover2.bench.backend import WARM_UP_TOKENS
from vllm_clover2.bench.config import SHIPPED_PROMPTS
from vllm_clover2.bench.engine import Engine
from vllm_clover2.bench.prompts import Prompt, read_prompts, render
from vllm_clover2.heads import SHIPPED
from vllm_clover2.records import provenance

HERE = Path(__file__).parent
KV_CACHE_BYTES = 1 << 30  # of each engine; about 22,000 tokens of SmolLM2 in float32
MAX_MODEL_LEN = 2048


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    option = parser.add_argument
    option(
        "--prompts",
        type=Path,
        default=SHIPPED_PROMPTS,
        help="JSON lines with `messages` and, if wanted, `task`",
    )
    option("--concurrency", type=int, default=1, help="requests in flight")
    option("--max-tokens", type=int, default=48, help="longest answer")
    option("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    option(
        "--methods",
        nargs="+",
        default=["none", "clover2"],
        choices=list(METHODS),
        help="'none' is vLLM without speculation; 'clover2' grows trees from the head "
        "and the request's own text, 'clover2_head' from the head alone",
    )
    option("--repeats", type=int, default=1, help="rounds per method")
    option(
        "--compile",
        action="store_true",
        help="compile the target: engines start minutes later and answer faster",
    )
    option("--target", type=Path, default=Path("build/SmolLM2-135M-Instruct"))
    option("--head", type=Path, default=SHIPPED / "smollm2-135m-instruct")
    option(
        "--num-speculative-tokens",
        type=int,
        help="nodes of the trees (the method's own default if left out)",
    )
    option("--output", type=Path, default=Path("build/demo.json"))
    args = parser.parse_args()
    # The others are compared with it, and it comes first.
    args.methods = ["none", *(name for name in args.methods if name != "none")]
    return args


def engine_arguments(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """What `vllm.LLM` is told, as a user would."""
    arguments = {
        "model": str(args.target),
        "dtype": args.dtype,
        "max_model_len": MAX_MODEL_LEN,
        "enforce_eager": not args.compile,
        "max_num_seqs": args.concurrency,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    if (options := METHODS[method].options) is not None:
        speculation = {"method": "clover2", "model": str(args.head), **options}
        # A chain is as long as its head was trained for.
        if args.num_speculative_tokens and options.get("tree") != "chain":
            speculation["num_speculative_tokens"] = args.num_speculative_tokens
        arguments["speculative_config"] = speculation
        arguments["per_request_spec_decode_metrics"] = "detailed"
    return arguments


def run(args: argparse.Namespace, prompts: list[Prompt], progress: Progress) -> dict:
    """Start the engines, then let each answer all prompts `repeats` times.

    Returns:
        For each method its rounds, see `Engine.answer`.
    """
    token_ids = [prompt.token_ids for prompt in prompts]
    bars = {
        method: progress.add_task(METHODS[method].title, total=None, note="waiting")
        for method in args.methods
    }

    def tell(method: str, note: str) -> None:
        progress.update(bars[method], note=note)
        if progress.disable:
            progress.console.print(f"{METHODS[method].title}: {note}")

    def start(method: str) -> None:
        tell(method, "loading the model")
        log = args.output.with_name(f"demo-{method}.log")
        engines[method] = Engine(engine_arguments(args, method), log)
        tell(method, "loaded")

    engines: dict[str, Engine] = {}
    rounds: dict[str, list] = {method: [] for method in args.methods}
    try:
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(start, args.methods))
        for method in args.methods:
            tell(method, "warming up")
            list(engines[method].answer(token_ids[: args.concurrency], WARM_UP_TOKENS))
            progress.update(bars[method], total=args.repeats * len(prompts))
            tell(method, "ready")
        for number in range(1, args.repeats + 1):
            for method in args.methods:
                engine = engines[method]
                note = f"round {number} of {args.repeats}"
                tell(method, note)
                finished = progress.tasks[bars[method]].completed
                for done in engine.answer(token_ids, args.max_tokens):
                    progress.update(bars[method], completed=finished + done)
                rounds[method].append(engine.last_round)
                speed = engine.last_round.tokens_per_second
                tell(method, f"{note}: {speed:.1f} tokens/s")
    finally:
        with ThreadPoolExecutor() as side_by_side:
            list(side_by_side.map(Engine.close, engines.values()))
    return rounds


def main() -> None:
    """Run, print the tables, write the figures."""
    args = parse_args()
    records = read_prompts(args.prompts)
    prompts = render(records, str(args.target))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[note]}"),
        Elapsed(),
    )
    console.print(
        f"{len(prompts)} prompts, {args.concurrency} in flight, {args.dtype}, at most "
        f"{args.max_tokens} tokens each, {args.repeats} rounds"
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal
    ) as progress:
        rounds = run(args, prompts, progress)
    figures = {
        "methods": summarise(records, rounds),
        "options": {name: str(value) for name, value in vars(args).items()},
        "provenance": provenance(),
    }
    args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    show(console, figures["methods"])
    console.print(f"All figures: {args.output}")


if __name__ == "__main__":
    main()
