# SPDX-License-Identifier: Apache-2.0
"""Which draft head belongs to which target: a small registry per user.

The registry is a JSON file, `~/.config/vllm-clover2/heads.json` (it honours
XDG_CONFIG_HOME; VLLM_CLOVER2_HEADS names another file).  Heads that ship with
the project are known without being added.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "NO_HEAD",
    "SHIPPED",
    "KnownHead",
    "add_head",
    "find_head",
    "known_heads",
    "local_folder",
    "read_config_json",
    "recorded_target",
    "remove_head",
]

NO_HEAD = "none"
"""In place of a head's name: speculate without one, from the request's own text."""

SHIPPED = Path(__file__).resolve().with_name("shipped_heads")

_ENVIRONMENT = "VLLM_CLOVER2_HEADS"
_logger = logging.getLogger(__name__)
# What the `target` section of a head's config must share with the target's own
# config, so that a renamed or moved target folder is still recognised.
_FINGERPRINT = ("hidden_size", "num_hidden_layers", "vocab_size")


@dataclass(frozen=True)
class KnownHead:
    target: str  # name or path, as the user gives it to vLLM
    folder: Path
    shipped: bool

    @property
    def problem(self) -> str | None:
        """Why its config cannot be read, or None: a look at one small file."""
        try:
            read_config_json(self.folder)
        except ValueError as error:
            return str(error)
        return None


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


def read_config_json(folder: Path, model_type: str = "clover2") -> dict[str, Any]:
    """What the config.json of a draft head says, its values unchecked.

    Raises:
        ValueError: there is none, or it is of another kind than `model_type`.
    """
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} is no draft head: it must hold a config.json and a "
            f"model.safetensors, but config.json cannot be read ({error})"
        ) from error
    found = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(content, dict) or found != model_type:
        raise ValueError(
            f"{folder} is no {model_type} head: the model_type in its config.json must "
            f"be {model_type!r}, found {found!r}. 'vllm-clover2 convert' reads "
            "checkpoints of the original project"
        )
    return content


def recorded_target(folder: Path) -> dict[str, Any]:
    """What the head's config says of the target that it was trained for."""
    recorded = read_config_json(folder).get("target")
    return recorded if isinstance(recorded, dict) else {}


def add_head(target: str, head: str | Path) -> KnownHead:
    """Remember that `head`, a folder or a name on the hub, is the head for `target`.

    Raises:
        ValueError: there is no such head, or its files are damaged.
    """
    from vllm_clover2.model.head_files import check_head

    folder = local_folder(str(head))
    check_head(folder)
    content = _read_registry()
    content[_normal(target)] = str(folder)
    _write_registry(content)
    return KnownHead(_normal(target), folder, shipped=False)


def local_folder(
    head: str,
    revision: str | None = None,
    cache: str | None = None,  # where the hub's files are kept; None: its own choice
) -> Path:
    """The folder `head`, or the hub's head of this name after it was downloaded."""
    folder = Path(head).expanduser()
    if folder.exists():
        return folder.resolve()
    from huggingface_hub import snapshot_download

    try:
        # Without a connection, or with HF_HUB_OFFLINE=1, this is what was downloaded
        # before.
        files = ["config.json", "model.safetensors"]
        return Path(
            snapshot_download(
                head, revision=revision, cache_dir=cache, allow_patterns=files
            )
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{head} must be a head's folder or its name on the hub, but there is no "
            f"such folder, and the hub does not give it ({error})"
        ) from error


def remove_head(target: str) -> None:
    """Forget the head for `target`; its files stay."""
    content = _read_registry()
    if content.pop(_normal(target), None) is None:
        raise ValueError(
            f"no head was added for {target!r}; added are: {sorted(content) or 'none'}"
        )
    _write_registry(content)


def known_heads() -> list[KnownHead]:
    """Heads the user added, then those that ship with the package."""
    added = [
        KnownHead(target, Path(folder), shipped=False)
        for target, folder in sorted(_read_registry().items())
    ]
    shipped = []
    for config_path in sorted(SHIPPED.glob("*/config.json")):
        folder = config_path.parent
        name = recorded_target(folder).get("name", folder.name)
        shipped.append(KnownHead(name, folder, shipped=True))
    return added + shipped


def find_head(target: str, target_config: Mapping[str, Any] | Any) -> Path:
    """The folder of the head for `target`.

    `target_config` is the target's config (an object or a mapping).  First the
    user's registry is asked by name; then every known head whose recorded target
    has this name and shape; among shipped heads the shape and the last part of
    the name decide, so that a local copy of a target finds its head.

    Raises:
        ValueError: there is none, with the heads that are known and what to do next;
            or the one that the user added for this target is gone.
    """
    heads = known_heads()
    for head in heads:
        if not head.shipped and head.target == _normal(target):
            if head.problem is not None:
                raise ValueError(
                    f"the head that was added for {target} must be readable: "
                    f"{head.problem}. Put it back, add another one, or forget it with "
                    f"`vllm-clover2 heads remove {target}`"
                )
            return head.folder
    for head in heads:
        if head.problem is not None:
            _logger.warning(
                "clover2: skipping the head that was added for %s (%s); forget it with "
                "`vllm-clover2 heads remove %s`",
                head.target,
                head.problem,
                head.target,
            )
        elif _same_target(recorded_target(head.folder), target, target_config):
            return head.folder
    raise ValueError(_no_head(target, heads))


def _no_head(target: str, heads: list[KnownHead]) -> str:
    listed = "\n".join(f"  {head.target} -> {head.folder}" for head in heads)
    return (
        f"no Clover-2 head is known for {target!r}. Known heads:\n"
        f"{listed or '  none'}\n"
        "Give a head's folder or its name on the hub as the speculative model, or "
        "train one from a file of prompts:\n"
        f"  vllm-clover2 generate --target {target} --prompts prompts.jsonl "
        "--output answers.jsonl\n"
        f"  vllm-clover2 train --target {target} --answers answers.jsonl "
        "--output run --draft-vocab-size 8192\n"
        f"  vllm-clover2 heads add {target} run/head\n"
        "Until then any target can be served without a head, by continuations of what "
        "its own text repeats:\n"
        "  --speculative-config "
        f'\'{{"method": "clover2", "model": "{NO_HEAD}"}}\''
    )


def _same_target(
    recorded: dict[str, Any], target: str, target_config: Mapping[str, Any] | Any
) -> bool:
    def actual(key: str) -> Any:
        if isinstance(target_config, Mapping):
            return target_config.get(key)
        return getattr(target_config, key, None)

    if any(recorded.get(key) != actual(key) for key in _FINGERPRINT):
        return False
    name = Path(target).name.lower()
    return str(recorded.get("name", "")).lower() == name
