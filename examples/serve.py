# SPDX-License-Identifier: Apache-2.0
"""Start ``vllm serve`` with Clover-2, let a client chat with it, stop it.

    python examples/serve.py

The server is the ordinary one; the same by hand:

    vllm serve build/SmolLM2-135M-Instruct --speculative-model clover2
    python examples/chat_client.py
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from chat_client import chat_about_all

TARGET = Path("build/SmolLM2-135M-Instruct")
LOG = Path("build/serve.log")
START_SECONDS = 600  # compiling the model for the first time takes most of it
STOP_SECONDS = 60


@contextlib.contextmanager
def server(arguments: list[str], log: Path) -> Iterator[str]:
    """A running ``vllm serve`` with these arguments; yields its base URL.

    The server has stopped, and all its processes with it, when the block is left.
    """
    port = free_port()
    command = [Path(sys.executable).with_name("vllm"), "serve", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its whole group can be stopped
        )
    try:
        wait_until_healthy(process, f"http://localhost:{port}/health", log)
        yield f"http://localhost:{port}/v1"
    finally:
        stop(process)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    """Return when the server answers; raise when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with (
            contextlib.suppress(OSError),  # refused or reset: not listening yet
            urllib.request.urlopen(url, timeout=5),
        ):
            return
        time.sleep(1)
    state = "took too long" if process.poll() is None else "stopped"
    tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    raise RuntimeError(f"The server {state} while starting. End of {log}:\n{tail}")


def stop(process: subprocess.Popen) -> None:
    """Ask the server to stop, as Ctrl-C does, and insist if it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


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
