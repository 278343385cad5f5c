# SPDX-License-Identifier: Apache-2.0
"""clover2 on stock vLLM's CUDA code, in both releases: text, and waits for the device.

Without a GPU: see ``fake_gpu``. What it does not show is in docs/serving.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scenarios import SCENARIOS
from stock_vllm import RELEASES, unpacked

HERE = Path(__file__).parent
REPO = HERE.parents[1]
PATHS = (REPO, HERE, REPO / "tests/ops/emulated_cuda", REPO / "tests/lossless")


def run(program: str, release: str, work: Path) -> dict[str, Any]:
    """What ``program`` found out in a process of its own."""
    command = [sys.executable, str(HERE / program), str(unpacked(release)), str(work)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((work / "results.json").read_text())


@pytest.fixture(scope="module", params=RELEASES)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What every scenario gave, by its name."""
    return run("scenarios.py", request.param, tmp_path_factory.mktemp("scenarios"))


@pytest.fixture(scope="module", params=RELEASES)
def starts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """How every engine of ``starts.py`` started, by its name."""
    return run("starts.py", request.param, tmp_path_factory.mktemp("starts"))


@pytest.mark.parametrize("name", SCENARIOS)
def test_text_is_that_of_plain_vllm(name: str, results: dict[str, Any]) -> None:
    scenario, result = SCENARIOS[name], results[name]
    v2 = scenario.runner == "V2"
    assert result["runner"] == ("Clover2ModelRunner" if v2 else "Clover2GPUModelRunner")
    assert result["differences"] == []  # request, first token
    assert result["log-probabilities"] < 1e-3
    answered = scenario.requests - scenario.aborted
    assert result["tokens"] == answered * scenario.tokens
    limited = {"max_num_batched_tokens", "max_num_seqs"} & scenario.options.keys()
    if scenario.planted and not limited:  # all requests run at the same time
        assert result["steps"] < scenario.tokens
    if scenario.planted and "chain" not in name:
        assert result["accepted"] > scenario.requests
        assert result["moved"] > scenario.requests


@pytest.mark.parametrize("name", ["own drafts", "own drafts, no head"])
def test_both_runners_draft_the_same(name: str, results: dict[str, Any]) -> None:
    """Below the same text; a near-tie may fall differently."""
    v1, v2 = results[name]["trees"], results[f"V2, {name}"]["trees"]
    texts = v1.keys() & v2.keys()
    assert len(texts) > 100
    equal = sum(v1[text] == v2[text] for text in texts)
    assert equal > 0.95 * len(texts)


def test_preemption_happened(results: dict[str, Any]) -> None:
    for name in ("preempted", "V2, preempted"):
        assert results[name]["preempted"] > 3
    assert results["chunked prefill"]["drafts"]["trimmed by the scheduler"] > 0


@pytest.mark.parametrize("name", ["CUDA kernels", "V2, CUDA kernels"])
def test_the_emulated_kernels_ran(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    assert result["kernels"] > 6 * result["steps"]  # four layers, accept, commit


# Per step of eight requests: waits of the host for the device, copies from memory that
# is not pinned, arrays that are pinned for one copy. As of today; to be lowered. (Where
# drafts are planted, the planter's own transfers would count.)
MOST = {
    "own drafts": (12, 19, 8),
    # Less where the head is not asked, more by levels that may pay.
    "own drafts, adaptive": (17, 19, 8),
    "own drafts, penalties": (18.5, 20, 9.1),
    "own drafts, chain": (13, 19, 8),
    # Plain vLLM waits once as well, for the tokens.
    "V2, own drafts": (1, 0, 0),
    "V2, own drafts, penalties": (1, 0, 0),
    "V2, own drafts, chain": (1, 0, 0),
    "V2, own drafts, no head": (1, 0, 0),
}


@pytest.mark.parametrize("name", MOST)
def test_waits_for_the_device(name: str, results: dict[str, Any]) -> None:
    steps, transfers = results[name]["steps"], results[name]["transfers"]
    found = tuple(
        sum(n for k, _, n in transfers if k == kind) / steps
        for kind in ("wait", "staged", "pin")
    )
    table = "\n".join(f"{n / steps:.2f} {k} {what}" for k, what, n in transfers)
    assert all(n <= most for n, most in zip(found, MOST[name], strict=True)), (
        f"{found}\n{table}"
    )


def test_backend_on_blackwell(starts: dict[str, Any]) -> None:
    """Of target and draft; vLLM would take FlashInfer."""
    assert starts["default"] == ["FLASH_ATTN", "FLASH_ATTN"]
    assert starts["default, chain"] == [None, None]
    assert starts["float32"] == [None, None]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("async", "does not support asynchronous scheduling"),
        ("full graphs", "- CUDA graphs of whole passes: "),
        ("backend without trees", "- trees with the attention backend FLEX_ATTENTION"),
        ("head size 32", "- trees with head size 32 (known are 64, 80, 96, 128, 256)"),
        ("no compiled ops", "- trees on CUDA without the compiled CUDA ops"),
        ("sliding window", "- sliding-window attention with trees on CUDA"),
        ("V2, sliding window", "- sliding-window attention with trees on CUDA"),
        ("V2, sampled drafts", "- drafts that are sampled: clover2's trees are not"),
    ],
)
def test_refused_at_start(name: str, reason: str, starts: dict[str, Any]) -> None:
    assert reason in starts[name]


def test_runner_v2_is_asynchronous(starts: dict[str, Any]) -> None:
    """Where the user asks for it; other engines of these tests run on V1."""
    for name in ("V2", "V2, async", "V2, no head", "V2, sliding window, chain"):
        assert starts[name] == [True, True]


def test_output_is_not_quantized_by_attention(starts: dict[str, Any]) -> None:
    """Stock TRITON_ATTN can; our kernel for the rows of trees cannot."""
    assert starts["quantized output"] == [True, False]
