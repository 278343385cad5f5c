# SPDX-License-Identifier: Apache-2.0
"""Commands in the README, in docs/ and in the cards of heads are ones that exist, links
between documents lead somewhere, and tables are complete.
"""

import ast
import functools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import families
import pytest
from huggingface_hub import ModelCard

from vllm_clover2 import cli
from vllm_clover2.heads import SHIPPED, recorded_target

REPO = Path(__file__).parents[2]
DOCUMENTS = [
    REPO / "README.md",
    REPO / "CONTRIBUTING.md",
    *sorted(REPO.glob("docs/*.md")),
    *sorted(SHIPPED.glob("*/README.md")),
]


def documented(start: str) -> list[list[str]]:
    """Words of the commands that begin with ``start``, continued lines joined."""
    found = []
    for path in DOCUMENTS:
        text = re.sub(r"\\\n\s*", "", path.read_text())
        lines = [line.strip() for line in text.splitlines() if line[:4] == " " * 4]
        lines = [line.removeprefix("$ ") for line in lines]
        commands = [line for line in lines if line.startswith(start)]
        found += [shlex.split(command, comments=True) for command in commands]
    return found


@pytest.mark.parametrize(
    "words",
    [
        *(words[1:] for words in documented("vllm-clover2 ")),
        *(
            words[words.index("vllm_clover2.cli") + 1 :]
            for words in documented("torchrun ")
        ),
    ],
    ids=" ".join,
)
def test_commands_have_valid_options(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_clover2.train.config.find_spec", lambda _: object())
    arguments = cli._parser().parse_args(words)
    if hasattr(arguments, "settings"):
        cli._settings_of(arguments)


@functools.cache
def help_of(script: str) -> str:
    command = [sys.executable, REPO / script, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        words
        for folder in ("examples", "kernels")
        for words in documented(f"python {folder}/")
        if "--" in " ".join(words)
        if words[1] != "examples/serve.py"  # has those of `vllm serve`
    ],
    ids=" ".join,
)
def test_scripts_know_their_options(words: list[str]) -> None:
    for word in words[2:]:
        if word.startswith("--"):
            assert word in help_of(words[1])


def test_make_pip_and_python_know_what_they_are_asked_for() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    makefile = (REPO / "Makefile").read_text()
    for name in re.findall(r"(?m)(?:`|^    )make ([a-z]+)", text):
        assert re.search(rf"(?m)^{name}:.* ## ", makefile), name
    for name in re.findall(r"(?:`|^    )python ([\w/]+\.py)", text):
        assert (REPO / name).exists(), name
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"pip install .*\[(\w+)\]", text):
        assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("folder", SHIPPED.iterdir(), ids=lambda folder: folder.name)
def test_cards_of_heads_have_the_hubs_metadata(folder: Path) -> None:
    about = ModelCard.load(folder / "README.md").data
    assert about.base_model.endswith(f"/{recorded_target(folder)['name']}")
    assert about.license == "apache-2.0"
    assert "speculative-decoding" in about.tags


def headings(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub names them."""
    lines = [x for x in path.read_text().splitlines() if x.startswith("#")]
    titles = [
        re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()) for line in lines
    ]
    return {title.replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_files_that_are_named_exist(document: Path) -> None:
    folders = "tests|docs|examples|kernels|vllm_clover2|integration"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text()):
        places = [REPO / name, REPO / "vllm_clover2" / name]
        assert any(place.exists() for place in places) or "NAME" in name, name


def test_every_patch_is_registered() -> None:
    patches = REPO / "vllm_clover2/integration/compat/patches.py"
    install = re.search(r"def install\(\).*?\n\n\n", patches.read_text(), re.DOTALL)
    assert install is not None
    made = re.findall(r"^    (_\w+)\(\)", install.group(), re.MULTILINE)
    listed = re.findall(
        r"^\| `(_\w+)`", (REPO / "docs/developing.md").read_text(), re.M
    )
    assert made == listed


def skip_reasons() -> set[str]:
    """The longest fixed part of every reason that a test can be skipped for."""
    found = set()
    for path in (REPO / "tests").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func).rpartition(".")[2]
            texts = [word.value for word in call.keywords if word.arg == "reason"]
            if name == "skip":
                texts += call.args
            elif name not in ("skipif", "importorskip"):
                continue
            parts = [part for text in texts for part in ast.walk(text)]
            words = [p.value for p in parts if isinstance(p, ast.Constant)]
            found |= {max(words, key=len).strip(" :")} if words else set()
    return found


def test_every_skip_is_listed() -> None:
    listed = " ".join((REPO / "CONTRIBUTING.md").read_text().split())
    reasons = skip_reasons()
    assert "no chromium to open the page in" in reasons
    assert not [reason for reason in reasons if reason not in listed]


def tables(folder: str) -> list[str]:
    """Lines of the tables that a folder of figures has, and ought to have."""
    from vllm_clover2.bench import report

    path = REPO / "docs" / folder
    results = json.loads((path / "results.json").read_text())["results"]
    table = report.markdown(results)
    assert (path / "table.md").read_text() == table
    return table.splitlines()


def test_figures_are_those_of_the_result_files() -> None:
    text = (REPO / "docs/results.md").read_text()
    rows = re.findall(r"^\| .* of \d+ \|$", text, re.MULTILINE)
    assert len(rows) == 5
    assert set(rows) <= set(tables("benchmark"))


def test_speed_under_load_is_that_of_the_result_file() -> None:
    measured: dict[str, list[str]] = {"`ngram`": [], "clover2": []}
    for line in tables("load"):
        cells = [cell.strip() for cell in line.split("|")]
        for name, speedups in measured.items():
            if len(cells) == 10 and cells[1] == name.strip("`"):
                speedups.append(cells[3].split()[0])
    for document in ("README.md", "docs/results.md"):
        text = (REPO / document).read_text()
        for name, speedups in measured.items():
            assert f"| {name} | {' | '.join(speedups)} |" in text


def test_families_of_targets_are_those_that_are_tested() -> None:
    text = families.SUPPORT.read_text()
    assert families.with_tables(text) == text, "run python tests/lossless/families.py"
