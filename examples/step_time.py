# SPDX-License-Identifier: Apache-2.0
"""Print what a step costs by the rows it verifies: a request's root and tree nodes.

    python examples/step_time.py [--dtype bfloat16]

These are the times that adaptive trees are sized by, measured when an engine starts:
one target pass with its output head, and drafting for one request.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def main() -> None:
    """Start an engine, ask its worker, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--target", default="build/SmolLM2-135M-Instruct")
    parser.add_argument("--head", default=HERE / "heads" / "smollm2-135m-instruct")
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
    Console().print(table)


if __name__ == "__main__":
    main()
