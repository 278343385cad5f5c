# SPDX-License-Identifier: Apache-2.0
"""`vllm-clover2 benchmark` with engines and with servers of a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def benchmark(target: Path, head: Path, output: Path, *words: str) -> dict[str, Any]:
    """Run the command; the content of its file of figures."""
    command = [sys.executable, "-m", "vllm_clover2.cli", "benchmark"]
    command += ["--target", target, "--head", head, "--output", output]
    command += ["--dtype", "float32", "--kv-cache-gib", "0.05", "--max-prompts", "1"]
    command += ["--enforce-eager"]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [*command, *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert f"all figures: {output / 'results.json'}" in done.stdout
    assert (output / "table.md").read_text().startswith("One request at a time")
    for plot in ("load.png", "tasks.png"):
        assert (output / plot).read_bytes().startswith(b"\x89PNG")
    return json.loads((output / "results.json").read_text())


def test_engines_are_measured_at_every_load(
    target: Path, head: Path, tmp_path: Path
) -> None:
    content = benchmark(
        *(target, head, tmp_path, "--methods", "clover2", "--concurrency", "1", "2"),
        *("--rounds", "2", "--max-tokens", "12"),
    )
    assert [result["concurrency"] for result in content["results"]] == [1, 2]
    assert len(content["rounds"]) == 8
    for result in content["results"]:
        plain, clover2 = result["methods"]["none"], result["methods"]["clover2"]
        assert plain["prompts"] == clover2["identical"] == plain["identical"] == 9
        assert plain["tokens_per_step"] == 1.0
        assert clover2["tokens_per_step"] >= 1.0
        assert clover2["speedup"]["min"] <= clover2["speedup"]["max"]
        assert clover2["step_cost"]["median"] > 0.0
        assert result["concurrency"] * 0.7 < plain["requests_in_flight"]
        assert plain["requests_in_flight"] <= result["concurrency"] + 0.1
    for one in content["rounds"]:
        tokens = [request["tokens"] for request in one["requests"]]
        steps = [request["steps"]["num_steps"] for request in one["requests"]]
        assert all(0 < count <= 12 for count in tokens)
        if one["method"] == "none":
            assert steps == [count - 1 for count in tokens]
        # A request's times lie inside its round.
        assert all(
            0
            < request["first_token_seconds"] + request["decode_seconds"]
            <= one["seconds"] + 0.01
            for request in one["requests"]
        )


def test_servers_are_measured_by_their_own_client(
    target: Path, head: Path, tmp_path: Path
) -> None:
    content = benchmark(
        *(target, head, tmp_path, "--served", "--methods", "none"),
        *("--concurrency", "1", "--rounds", "1", "--max-tokens", "8"),
    )
    (result,) = content["results"]
    figures = result["methods"]["none"]
    assert figures["tokens_per_second"] > 0
    assert figures["tokens_per_step"] == 1.0
    assert [prompt["task"] for prompt in content["prompts"]][:2] == ["qa", "writing"]
    (one,) = content["rounds"]
    assert [request["tokens"] for request in one["requests"]] == [8] * 9
