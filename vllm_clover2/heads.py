# SPDX-License-Identifier: Apache-2.0
"""Which draft head belongs to which target: a small registry per user.

The registry is a JSON file, `~/.config/vllm-clover2/heads.json` (it honours
XDG_CONFIG_HOME; VLLM_CLOVER2_HEADS names another file).  Heads that ship with
the project are known without being added.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KnownHead", "add_head", "find_head", "known_heads", "remove_head"]

_ENVIRONMENT = "VLLM_CLOVER2_HEADS"
_SHIPPED = Path(__file__).resolve().parents[1] / "examples" / "heads"
# What the `target` section of a head's config must share with the target's own
# config, so that a renamed or moved target folder is still recognised.
_FINGERPRINT = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class KnownHead:
    target: str  # name or path, as the user gives it to vLLM
    folder: Path
    shipped: bool


def registry_path() -> Path:
    """The user's registry file (it need not exist)."""
    override = os.environ.get(_ENVIRONMENT)
    if override:
        return Path(override)
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "vllm-clover2" / "heads.json"


def _read_registry() -> dict[str, str]:
    path = registry_path()
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the head registry {path} is not valid JSON ({error}); correct or delete "
            "it"
        ) from error
    if not isinstance(content, dict) or not all(
        isinstance(folder, str) for folder in content.values()
    ):
        raise ValueError(
            f"the head registry {path} must map targets to head folders; correct or "
            "delete it"
        )
    return content


def _write_registry(content: dict[str, str]) -> None:
    path = registry_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def _normal(target: str) -> str:
    """Paths become absolute; names of the hub stay as they are."""
    path = Path(target).expanduser()
    return str(path.resolve()) if path.exists() else target.rstrip("/")


def _head_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} is no draft head: config.json cannot be read ({error})"
        ) from error
    if config.get("model_type") != "clover2":
        raise ValueError(
            f"{folder} is no Clover-2 head: its model_type must be 'clover2', found "
            f"{config.get('model_type')!r}; `vllm-clover2 convert` reads checkpoints "
            "of the original project"
        )
    if not (folder / "model.safetensors").is_file():
        raise ValueError(f"{folder} has no model.safetensors; copy the head again")
    return config


def add_head(target: str, folder: Path) -> KnownHead:
    """Remember that `folder` holds the head for `target`."""
    folder = folder.expanduser().resolve()
    _head_config(folder)
    content = _read_registry()
    content[_normal(target)] = str(folder)
    _write_registry(content)
    return KnownHead(_normal(target), folder, shipped=False)


def remove_head(target: str) -> None:
    """Forget the head for `target`; its files stay."""
    content = _read_registry()
    if content.pop(_normal(target), None) is None:
        raise ValueError(
            f"no head was added for {target!r}; added are: {sorted(content) or 'none'}"
        )
    _write_registry(content)


def known_heads() -> list[KnownHead]:
    """Heads the user added, then those that ship with the project."""
    added = [
        KnownHead(target, Path(folder), shipped=False)
        for target, folder in sorted(_read_registry().items())
    ]
    shipped = []
    for config_path in sorted(_SHIPPED.glob("*/config.json")):
        folder = config_path.parent
        name = (_head_config(folder).get("target") or {}).get("name", folder.name)
        shipped.append(KnownHead(name, folder, shipped=True))
    return added + shipped


def find_head(target: str, target_config: Mapping[str, Any] | Any) -> Path:
    """The folder of the head for `target`.

    `target_config` is the target's config (an object or a mapping).  First the
    user's registry is asked by name; then every known head whose recorded target
    has this name and shape; among shipped heads the shape and the last part of
    the name decide, so that a local copy of a target finds its head.

    Raises:
        ValueError: there is none; the message lists the heads that are known.
    """
    heads = known_heads()
    for head in heads:
        if not head.shipped and head.target == _normal(target):
            return head.folder
    for head in heads:
        if _same_target(_head_config(head.folder), target, target_config):
            return head.folder
    listed = "\n".join(f"  {head.target} -> {head.folder}" for head in heads)
    raise ValueError(
        f"no Clover-2 head is known for {target!r}. Known heads:\n"
        f"{listed or '  none'}\n"
        "Add one with `vllm-clover2 heads add TARGET HEAD_FOLDER`, or give its folder "
        "as the speculative model."
    )


def _same_target(
    head_config: dict[str, Any], target: str, target_config: Mapping[str, Any] | Any
) -> bool:
    recorded = head_config.get("target") or {}

    def actual(key: str) -> Any:
        if isinstance(target_config, Mapping):
            return target_config.get(key)
        return getattr(target_config, key, None)

    if any(recorded.get(key) != actual(key) for key in _FINGERPRINT):
        return False
    name = Path(target).name.lower()
    return str(recorded.get("name", "")).lower() == name
