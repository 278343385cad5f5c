# SPDX-License-Identifier: Apache-2.0
"""Print what a step costs by the rows it verifies: a request's root and tree nodes.

    python examples/step_time.py [--dtype bfloat16]

These are the times that adaptive trees are sized by, measured when an engine starts:
one target pass with its output head, and drafting for one request. A second table has
the parts of one request's step, measured when asked, and what share drafting is.
"""

import argparse

from rich.console import Console
from rich.table import Table

from vllm_clover2.heads import SHIPPED


def main() -> None:
    """Start an engine, ask its worker, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--head", default=SHIPPED / "smollm2-135m-instruct")
    args = parser.parse_args()

    from vllm import LLM  # takes seconds, so after --help

    llm = LLM(
        args.target,
        dtype=args.dtype,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 30,
        speculative_config={"method": "clover2", "model": str(args.head)},
    )
    milliseconds = llm.collective_rpc("clover2_step_milliseconds")[0]
    table = Table(title=f"A step of {args.target}, {args.dtype}")
    table.add_column("rows", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("against 1 row", justify="right")
    for rows, time in milliseconds.items():
        table.add_row(str(rows), f"{time:.1f}", f"{time / milliseconds[1]:.2f}x")
    console = Console()
    console.print(table)
    show_parts(console, llm.collective_rpc("clover2_part_milliseconds")[0])


def show_parts(console: Console, milliseconds: dict[str, float]) -> None:
    """Print what the parts of a step take, and drafting against the target's pass."""
    draft = sum(
        time for part, time in milliseconds.items() if not part.startswith("target_")
    )
    table = Table(title="Parts of one request's step")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("drafting against it", justify="right")
    for part, time in milliseconds.items():
        name, _, rows = part.partition("_")
        share = f"{draft / time:.1%}" if name == "target" else ""
        label = f"{name}, rows: {rows}" if rows else name
        table.add_row(label, f"{time:.1f}", share)
    console.print(table)


if __name__ == "__main__":
    main()
