# SPDX-License-Identifier: Apache-2.0
"""Results of `vllm bench serve`, in the shape of its files."""

from pathlib import Path

import pytest

from vllm_clover2.bench.config import BenchmarkConfig
from vllm_clover2.bench.figures import Steps
from vllm_clover2.bench.served import ServerBackend, read_result, server_arguments


@pytest.fixture
def result() -> dict:
    """Two requests, as vLLM 0.32 writes them; keys that are not read are left out."""
    return {
        "max_concurrency": 2,
        "duration": 1.5,
        "completed": 2,
        "failed": 0,
        "total_output_tokens": 24,
        "output_lens": [16, 8],
        "ttfts": [0.25, 0.5],
        "latencies": [1.25, 1.0],
        "generated_texts": ["able con", "thow cont"],
        "errors": ["", ""],
        "spec_decode_num_drafts": 10,
        "spec_decode_draft_tokens": 250,
        "spec_decode_accepted_tokens": 11,
        "spec_decode_per_position_acceptance_rates": [0.7, 0.4, 0.0, 0.0],
    }


def test_requests_keep_their_order_and_times(result: dict):
    measured = read_result(result, 2)
    requests = measured.requests
    assert measured.seconds == 1.5
    assert [request.num_tokens for request in requests] == [16, 8]
    assert [request.content for request in requests] == ["able con", "thow cont"]
    assert [request.first_token_seconds for request in requests] == [0.25, 0.5]
    assert [request.decode_seconds for request in requests] == [1.0, 0.5]


def test_steps_are_what_accepted_tokens_leave(result: dict):
    steps = read_result(result, 2).steps
    # 22 tokens after the first ones, 11 of them drafted; 10 of 11 steps had a draft.
    assert steps == Steps(11, [7, 4])


def test_without_speculation_every_token_is_a_step(result: dict):
    plain = {key: result[key] for key in result if "spec_decode" not in key}
    assert read_result(plain, 2).steps == Steps(22, [])


def test_unanswered_prompts_are_an_error(result: dict):
    result |= {"completed": 1, "errors": ["", "Bad Request"]}
    with pytest.raises(RuntimeError, match="answered 1; the first error: Bad Request"):
        read_result(result, 2)


def test_servers_get_the_settings_of_engines():
    config = BenchmarkConfig(target="t", concurrency=[4, 2], kv_cache_gib=0.5)
    words = server_arguments(config, "ngram", 512)
    assert words[:2] == ["t", "--no-enable-prefix-caching"]
    options = dict(zip(words[2::2], words[3::2]))
    assert options["--max-num-seqs"] == "4"
    assert options["--max-model-len"] == "512"
    assert options["--kv-cache-memory-bytes"] == str(1 << 29)
    assert options["--speculative-config"].startswith('{"method": "ngram"')
    plain = server_arguments(config, "none", 512)
    assert "--speculative-config" not in plain
    assert "--enforce-eager" not in plain
    eager = config.model_copy(update={"enforce_eager": True})
    assert set(server_arguments(eager, "none", 512)) - set(plain) == {"--enforce-eager"}


def test_a_client_that_stops_names_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class NoServer:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> str:
            return "http://127.0.0.1:1/v1"

        def __exit__(self, *_: object) -> None: ...

    (tmp_path / "vllm").write_text("#!/bin/sh\necho no server; exit 3\n")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setattr("vllm_clover2.bench.served.server", NoServer)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    config = BenchmarkConfig(target="t", output=tmp_path)
    backend = ServerBackend(config, "none", 512)
    with pytest.raises(RuntimeError, match="stopped with code 3") as error:
        backend.warm_up([])
    assert str(tmp_path / "client-none.log") in str(error.value)
    assert (tmp_path / "client-none.log").read_text() == "no server\n"
