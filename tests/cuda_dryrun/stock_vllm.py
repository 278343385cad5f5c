# SPDX-License-Identifier: Apache-2.0
"""The Python files of stock vLLM's CUDA wheels, for machines that cannot run them.

Downloaded once (330 MB each, of which 45 MB of Python are kept) to ``build/``.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
REPO = HERE.parents[1]
_PATHS = (REPO, HERE, REPO / "tests/ops/emulated_cuda", REPO / "tests/lossless")
RELEASES = ("0.32.0", "0.33.0")


def unpacked(release: str) -> Path:
    """A folder to import ``vllm`` of this release from; it has no compiled library.

    Skips the test where the wheel cannot be had.
    """
    problem = _fetch(release)
    if problem is not None:
        pytest.skip(f"no wheel of vllm {release}: {problem}")
    return _folder(release)


def run(program: str, release: str, work: Path) -> dict[str, Any]:
    """What ``program`` found out in a process of its own."""
    command = [sys.executable, str(HERE / program), str(unpacked(release)), str(work)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, _PATHS))}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((work / "results.json").read_text())


def _folder(release: str) -> Path:
    return REPO / "build" / f"vllm-{release}"


@functools.cache
def _fetch(release: str) -> str | None:
    """Download and unpack; the reason if that is impossible."""
    folder = _folder(release)
    if folder.exists():
        return None
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):  # other test processes want it too
        return None if folder.exists() else _download(release, folder)


def _download(release: str, folder: Path) -> str | None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
            *("--only-binary", ":all:", "--retries", "1", "--timeout", "30"),
            *("--dest", scratch, f"vllm=={release}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["pip download failed"])[-1]
        (wheel,) = Path(scratch).glob("vllm-*.whl")
        files = Path(scratch) / "files"
        with zipfile.ZipFile(wheel) as archive:
            wanted = [n for n in archive.namelist() if n.endswith((".py", "METADATA"))]
            archive.extractall(files, wanted)
        # In one go: a folder that exists is whole.
        shutil.move(files, folder)
    return None
