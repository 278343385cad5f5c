# SPDX-License-Identifier: Apache-2.0
"""Start ``vllm serve`` with Clover-2, let a client chat with it, stop it.

    python examples/serve.py

The server is the ordinary one; the same by hand:

    vllm serve build/SmolLM2-135M-Instruct --speculative-model clover2
    python examples/chat_client.py
"""

import asyncio
import sys
from pathlib import Path

from chat_client import chat_about_all

from vllm_clover2.bench.server import server

TARGET = Path("build/SmolLM2-135M-Instruct")
LOG = Path("build/serve.log")


def main() -> None:
    """Serve the example target with the head that ships for it, and chat."""
    LOG.parent.mkdir(exist_ok=True)
    arguments = [
        str(TARGET),
        "--speculative-model",
        "clover2",
        "--max-model-len=2048",
        "--kv-cache-memory-bytes=2G",  # vLLM would take nearly all memory
        *sys.argv[1:],
    ]
    print(f"Starting the server (a minute or two; log in {LOG})", flush=True)
    with server(arguments, LOG) as base_url:
        for answer in asyncio.run(chat_about_all(base_url)).values():
            print(f"\n{answer}")
    print("\nThe server has stopped.")


if __name__ == "__main__":
    main()
