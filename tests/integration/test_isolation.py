# SPDX-License-Identifier: Apache-2.0
"""What the package does to processes that do not use it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from engine_fixtures import Baseline, random_prompts

import vllm_clover2

PACKAGE = Path(vllm_clover2.__file__).parent


def python(program: str, **environment: str) -> str:
    """Last line that ``program`` prints in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip().splitlines()[-1]


def test_everything_but_integration_works_without_vllm() -> None:
    names = [
        ".".join(("vllm_clover2", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in sorted(PACKAGE.rglob("*.py"))
        if "integration" not in path.relative_to(PACKAGE).parts
    ]
    names = [name.removesuffix(".__init__") for name in names]
    assert {"vllm_clover2.tree.growth", "vllm_clover2.ops", "vllm_clover2.cli"} <= (
        set(names)
    )
    program = (
        "import importlib, sys\n"
        "sys.modules['vllm'] = None  # every import of it fails\n"
        f"for name in {names}:\n"
        "    importlib.import_module(name)\n"
        "print(sum(name.startswith('vllm_clover2.integration')"
        " for name in sys.modules))\n"
    )
    assert python(program) == "0"


def test_lower_layers_do_not_know_integration() -> None:
    """Not even inside functions."""
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if parts[0] in ("tree", "ops", "model", "train", "bench"):
            assert "vllm_clover2.integration" not in path.read_text(), path


@pytest.fixture
def generation(target: Path) -> str:
    """A program that prints a plain engine's tokens, then what clover2 answers."""
    requests = [list(request.prompt) for request in random_prompts(3, seed=120)]
    return (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "from vllm.engine.arg_utils import EngineArgs\n"
        f"llm = LLM({str(target)!r}, dtype='float32', max_model_len=512,\n"
        "    enforce_eager=True, kv_cache_memory_bytes=8 << 20)\n"
        "outputs = llm.generate(\n"
        f"    [{{'prompt_token_ids': p}} for p in {requests}],\n"
        "    SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))\n"
        "refusal = ''\n"
        "try:\n"
        f"    EngineArgs(model={str(target)!r}, speculative_config={{\n"
        "        'method': 'clover2', 'model': 'no/such/head'}"
        ").create_engine_config()\n"
        "except Exception as error:\n"
        "    refusal = str(error)\n"
        "print(json.dumps({\n"
        "    'tokens': [list(o.outputs[0].token_ids) for o in outputs],\n"
        "    'refusal': refusal,\n"
        "    'ours': [m for m in sys.modules if m.startswith('vllm_clover2')]}))\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("plugins", [None, "someone_elses"], ids=["all", "left-out"])
def test_plain_engines_are_not_touched(
    plugins: str | None, generation: str, baseline: Baseline
) -> None:
    """Same tokens with the plugin and without; it imports next to nothing."""
    environment = {
        "HF_HUB_OFFLINE": "1",  # nobody shall be asked for no/such/head
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    answer = json.loads(python(generation, **environment))
    expected = baseline(random_prompts(3, seed=120))
    assert answer["tokens"] == [output.tokens for output in expected]
    assert not [m for m in answer["ours"] if "worker" in m or "runner" in m]
    if plugins == "someone_elses":
        assert answer["ours"] == []
        assert "Input should be 'ngram'" in answer["refusal"]  # vLLM's own answer
    else:
        assert "no/such/head" in answer["refusal"]
