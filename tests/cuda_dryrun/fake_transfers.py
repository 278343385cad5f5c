# SPDX-License-Identifier: Apache-2.0
"""What goes between the host and a GPU that is not there, and who sends it."""

import sys
from collections import Counter
from pathlib import Path

import fake_graphs

_HERE = str(Path(__file__).parent)


class Transfers:
    """What goes between host and device, by (kind, place), while ``counting``.

    Kinds: ``wait`` (the host waits for the device), ``staged`` (a copy from memory that
    is not pinned: asynchronous in name only), ``pin`` (memory is pinned for one copy).
    """

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.counting = False

    def add(self, kind: str, what: str) -> None:
        if fake_graphs.capturing():
            raise RuntimeError(
                f"{what} ({kind}) while a CUDA graph is captured, at {caller()}"
            )
        if self.counting:
            self.counts[kind, f"{what} at {caller()}"] += 1

    def total(self, kind: str) -> int:
        return sum(n for (k, _), n in self.counts.items() if k == kind)


transfers = Transfers()


def caller() -> str:
    """``file.py:function``, of the nearest code of vLLM or of ours."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        theirs_or_ours = "/vllm/" in file or "/vllm_clover2/" in file
        if theirs_or_ours and not file.startswith(_HERE):
            return f"{file.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
