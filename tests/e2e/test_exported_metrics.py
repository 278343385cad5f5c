# SPDX-License-Identifier: Apache-2.0
"""What two engines behind two API servers export, and the dashboard that shows it."""

import json
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from vllm_clover2.bench.server import server

pytestmark = pytest.mark.slow

DASHBOARD = Path(__file__).parents[2] / "examples/grafana_dashboard.json"
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, target: Path, head: Path
) -> Iterator[str]:
    """Every step drafts, whatever it costs here."""
    options = {"method": "clover2", "model": str(head), "adaptive": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "INFO")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        arguments = [
            str(target),
            *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", "512", "--kv-cache-memory-bytes", str(16 << 20)),
            *("--data-parallel-size", "2", "--api-server-count", "2"),
            *("--speculative-config", json.dumps(options)),
        ]
        log = tmp_path_factory.mktemp("server") / "server.log"
        with server(arguments, log) as address:
            yield address


@pytest.fixture(scope="module")
def metrics(url: str) -> list[Metric]:
    """Of two dozen requests, eight at a time, a few of them with a grammar."""
    grammar = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}

    def ask(number: int) -> None:
        # A connection each, so that both API servers are asked.
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": f"Count to {number}, {number}."}],
                temperature=0.0,
                max_tokens=24,
                **({"response_format": grammar} if number % 4 == 0 else {}),
            )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(24)))
    address = url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(address, timeout=30) as response:
        return list(text_string_to_metric_families(response.read().decode()))


def sums(metrics: list[Metric], **labels: str) -> Counter[str]:
    """Values by sample name, over all series that have these labels."""
    found: Counter[str] = Counter()
    for metric in metrics:
        for sample in metric.samples:
            if labels.items() <= sample.labels.items():
                found[sample.name] += sample.value
    return found


@pytest.mark.parametrize("engine", ["0", "1"])
def test_every_engine_is_exported(metrics: list[Metric], engine: str) -> None:
    found = sums(metrics, engine=engine, model_name="tiny")
    drafts = found["vllm:spec_decode_num_drafts_total"]
    nodes = found["vllm:spec_decode_num_draft_tokens_total"]
    assert 0 < drafts <= nodes
    assert found["vllm:clover2_accepted_depth_count"] == drafts
    # vLLM does not count those that a grammar forbids.
    assert found["vllm:clover2_verified_nodes_total"] >= nodes
    accepted = found["vllm:spec_decode_num_accepted_tokens_total"]
    assert found["vllm:clover2_accepted_nodes_total"] == accepted
    assert found["vllm:clover2_levels_grown_total"] > 0
    assert found["vllm:clover2_drafting_seconds_sum"] > 0.0
    assert found["vllm:clover2_verification_seconds_sum"] > 0.0


def test_labels(metrics: list[Metric]) -> None:
    def of(engine_sample: str, label: str) -> set[str]:
        return {
            sample.labels[label]
            for metric in metrics
            for sample in metric.samples
            if sample.name == engine_sample
        }

    assert of("vllm:clover2_verified_nodes_total", "source") == {"head", "text", "both"}
    assert "structured_output" in of("vllm:clover2_fallbacks_total", "reason")
    positions = of("vllm:spec_decode_num_accepted_tokens_per_pos_total", "position")
    assert positions == {str(depth) for depth in range(16)}


def test_the_dashboard_shows_what_is_exported(metrics: list[Metric]) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    exported = {sample.name for metric in metrics for sample in metric.samples}
    assert shown <= exported

    families = {m.name for m in metrics if m.name.startswith("vllm:clover2_")}
    suffix = re.compile(r"_(total|bucket|sum|count)$")
    assert families <= {suffix.sub("", name) for name in shown}

    labels = {label for m in metrics for sample in m.samples for label in sample.labels}
    used = {
        label
        for query in queries
        for group in re.findall(r"by \(([\w, ]+)\)", query)
        for label in group.split(", ")
    }
    assert used <= labels
