# SPDX-License-Identifier: Apache-2.0
"""Tries to start engines, one after the other, and tells what each is refused with.

    python head_loading.py TARGET ANSWERS HEAD...

In a process of its own, because an engine that fails to start tears down the process
groups of those that run beside it.
"""

import json
import sys
from pathlib import Path

from vllm import LLM


def refusal(target: str, head: str) -> str | None:
    try:
        LLM(
            target,
            dtype="float32",
            max_model_len=128,
            enforce_eager=True,
            kv_cache_memory_bytes=4 << 20,
            speculative_config={"method": "clover2", "model": head},
        )
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    answers = [refusal(sys.argv[1], head) for head in sys.argv[3:]]
    Path(sys.argv[2]).write_text(json.dumps(answers))
