# SPDX-License-Identifier: Apache-2.0
"""What a file that is continued says of itself, and how to know a target again."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["refuse_changes", "target_fingerprint"]

# Of a large file this many blocks are hashed, evenly spread: no other training of a
# model has the same ones, and a large target is known in a second.
_BLOCKS = 64
_BLOCK_BYTES = 1 << 16
# Weights, configurations, tokenizers and chat templates.
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".jinja", ".txt")


def target_fingerprint(target: str) -> str:
    """What `target`'s files hold: a hash of a folder, the commit of a hub's model.

    A folder that is moved or copied keeps its fingerprint.
    """
    folder = Path(target)
    if not folder.is_dir():
        from transformers import AutoConfig

        return f"commit {AutoConfig.from_pretrained(target)._commit_hash}"  # noqa: SLF001
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _SUFFIXES:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for block in _sample(path):
                digest.update(block)
    return f"sha256 {digest.hexdigest()}"


def _sample(path: Path) -> list[bytes]:
    """All of a small file, evenly spread blocks of a large one."""
    last = path.stat().st_size - _BLOCK_BYTES
    if last < _BLOCKS * _BLOCK_BYTES:
        return [path.read_bytes()]
    blocks = []
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(last * number // (_BLOCKS - 1))
            blocks.append(file.read(_BLOCK_BYTES))
    return blocks


def refuse_changes(
    what: str, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str
) -> None:
    """Raise ValueError, with what differs, unless `what` was made like this."""
    changed = {
        key: f"{before.get(key)} before, {now.get(key)} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    }
    if changed:
        raise ValueError(f"{what} was made otherwise ({changed}); {remedy}")
