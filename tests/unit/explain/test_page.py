# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser, whatever is written in it."""

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tiny_models import TinyModel, save_target

from vllm_clover2 import cli
from vllm_clover2.explain.page import _DATA, _TEMPLATE

SHAPE = TinyModel(num_layers=2)
PROMPT = (
    "</script><script>throw 1</script><b onclick='x'>&amp; 😀 \u2028 ${x}`\\ a b a b"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    save_target(folder / "target", SHAPE)
    options = ["--target", str(folder / "target"), "--head", "none"]
    output = folder / "new" / "page.html"
    written = [PROMPT, *options, "--max-tokens", "24", "--output", str(output)]
    assert cli.main(["explain", *written]) == 0
    return output


def test_page_is_one_file_without_markup_of_the_prompt(page: Path) -> None:
    content = page.read_text("utf-8")
    assert "<b onclick" not in content
    assert content.count("</script>") == _TEMPLATE.read_text("utf-8").count("</script>")
    assert _DATA not in content
    outside = content.replace("http://www.w3.org/2000/svg", "")
    for address in ("http:", "https:", "src=", "@import", "url("):
        assert address not in outside


def opened(page: Path, folder: Path, anchor: str = "") -> tuple[str, str]:
    """The page's elements, and what the browser's console shows, in Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium to open the page in")
    done = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--enable-logging=stderr", f"--user-data-dir={folder}", "--dump-dom"),
            page.as_uri() + anchor,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    shown = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(shown)


class Elements(HTMLParser):
    """Attributes of all elements, and the text of those with a name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[dict[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self._name = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append(dict(attrs))
        self._name = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        self._name = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._name] = self.texts.get(self._name, "") + data

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        return [e for e in self.found if name in (e.get("class") or "").split()]


@pytest.mark.slow
def test_browser_shows_every_step(page: Path, tmp_path: Path) -> None:
    dom, console = opened(page, tmp_path, "#2")
    assert console == ""
    shown = Elements(dom)
    assert shown.texts["prompt"] == PROMPT
    labels = [e.get("aria-label") or "" for e in shown.found]
    steps = [label for label in labels if label.startswith("step ") and ":" in label]
    assert len(steps) > 2
    assert shown.texts["name"] == f"Step 2 of {len(steps)}"
    current = [e["aria-label"] for e in shown.found if "aria-current" in e]
    assert current == [steps[1]]
    nodes, _, rest = shown.texts["summary"].partition(" ")
    drawn = [e for e in shown.of_class("node") if e["data-row"] not in ("0", "-1")]
    assert len(drawn) == int(nodes)
    accepted = int(rest.split(", ")[1].split()[0])
    assert len(shown.of_class("accepted")) == accepted


@pytest.mark.slow
def test_browser_reports_errors(tmp_path: Path) -> None:
    """Otherwise the console of the test above would be empty whatever happens."""
    page = tmp_path / "page.html"
    page.write_text("<script>throw new Error('seen')</script>")
    _, console = opened(page, tmp_path / "profile")
    assert "seen" in console
