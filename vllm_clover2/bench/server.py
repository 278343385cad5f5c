# SPDX-License-Identifier: Apache-2.0
"""A ``vllm serve`` of this machine, started and stopped."""

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

__all__ = ["server"]

_START_SECONDS = 600  # compiling the model for the first time takes most of it
_STOP_SECONDS = 60
_LOG_TAIL = 2000  # characters


@contextlib.contextmanager
def server(arguments: list[str], log: Path) -> Iterator[str]:
    """A running ``vllm serve`` with these arguments, for this machine only.

    Yields its base URL. The server has stopped, and all its processes with it, when the
    block is left.

    Raises:
        RuntimeError: it does not start; the message has the end of its log.
    """
    port = _free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its whole group can be stopped
        )
    try:
        _wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    """Return when the server answers; raise when it ends or takes too long."""
    # The proxy that the environment may name is not for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with (
            contextlib.suppress(OSError),  # refused or reset: not listening yet
            opener.open(url, timeout=5),
        ):
            return
        time.sleep(1)
    state = "took too long" if process.poll() is None else "stopped"
    tail = log.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
    raise RuntimeError(f"The server {state} while starting. End of {log}:\n{tail}")


def _stop(process: subprocess.Popen) -> None:
    """Ask the server to stop, as Ctrl-C does, and insist if it does not."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
