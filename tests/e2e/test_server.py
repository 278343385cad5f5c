# SPDX-License-Identifier: Apache-2.0
"""``vllm serve`` with clover2, asked by an unmodified ``openai`` client."""

import asyncio
import http.client
import json
import random
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from engines import Engine
from prometheus_client.parser import text_string_to_metric_families
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from vllm_clover2.bench.server import server

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is a licence?",
    "Name three colours.",
    "Who wrote this, and why was it written in such a long sentence?",
    "Hi",
    "You may reproduce and distribute copies of the Work in any medium.",
    "1 2 3 4 5",
]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer"}, "tag": {"enum": ["a", "bb"]}},
    "required": ["age", "tag"],
    "additionalProperties": False,
}
LENGTH = 40
DASHBOARD = Path(__file__).parents[2] / "examples/grafana_dashboard.json"


def arguments(target: Path) -> list[str]:
    return [
        str(target),
        *("--host", "127.0.0.1", "--served-model-name", "tiny"),
        *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(16 << 20), "--max-num-seqs", "16"),
    ]


@pytest.fixture(scope="module")
def url(environment: Path, target: Path, head: Path) -> Iterator[str]:
    """A server that was told no more than ``--speculative-model clover2``."""
    command = Path(sys.executable).with_name("vllm-clover2")
    subprocess.run([command, "heads", "add", str(target), str(head)], check=True)
    flags = ["--speculative-model", "clover2"]
    with server([*arguments(target), *flags], environment / "server.log") as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0)


def offline(plain: Engine, question: str, **params: Any) -> str:
    """The answer of vLLM without speculation."""
    defaults = {"temperature": 0.0, "max_tokens": LENGTH}
    outputs = plain.llm.chat(
        [{"role": "user", "content": question}],
        SamplingParams(**(defaults | params)),
        use_tqdm=False,
    )
    return outputs[0].outputs[0].text


def chat(client: openai.OpenAI, question: str, **params: Any) -> Any:
    defaults = {"temperature": 0.0, "max_tokens": LENGTH}
    return client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        **(defaults | params),
    )


def test_answers_are_those_of_plain_vllm(client: openai.OpenAI, plain: Engine) -> None:
    for question in QUESTIONS:
        answer = chat(client, question)
        assert answer.choices[0].message.content == offline(plain, question)
        assert answer.choices[0].finish_reason in ("length", "stop")
        assert 0 < answer.usage.completion_tokens <= LENGTH


def test_several_streams_at_once(url: str, plain: Engine) -> None:
    async def stream(client: openai.AsyncOpenAI, question: str) -> tuple[str, int]:
        chunks = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": question}],
            temperature=0.0,
            max_tokens=LENGTH,
            stream=True,
        )
        parts = [
            chunk.choices[0].delta.content or ""
            async for chunk in chunks
            if chunk.choices
        ]
        return "".join(parts), len(parts)

    async def all_streams() -> list[tuple[str, int]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            return await asyncio.gather(*(stream(client, q) for q in QUESTIONS))

    answers = asyncio.run(all_streams())
    assert [text for text, _ in answers] == [offline(plain, q) for q in QUESTIONS]
    assert all(parts > 1 for _, parts in answers)


def test_seeded_sampling(client: openai.OpenAI, plain: Engine) -> None:
    for seed, question in enumerate(QUESTIONS[:3]):
        params = {"temperature": 0.9, "top_p": 0.9, "seed": seed}
        answer = chat(client, question, **params)
        assert answer.choices[0].message.content == offline(plain, question, **params)


def test_min_p_and_logit_bias(client: openai.OpenAI, plain: Engine) -> None:
    """vLLM refuses them with any other speculation."""
    params = {"temperature": 0.9, "seed": 3, "logit_bias": {17: 4.0}, "min_p": 0.2}
    served = params | {"logit_bias": {"17": 4.0}}
    min_p = {"min_p": served.pop("min_p")}
    answer = chat(client, QUESTIONS[0], extra_body=min_p, **served)
    assert answer.choices[0].message.content == offline(plain, QUESTIONS[0], **params)


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, QUESTIONS[0], logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    assert all(entry.logprob <= 0.0 for entry in entries)


def test_structured_output(client: openai.OpenAI, plain: Engine) -> None:
    schema = {"name": "person", "schema": SCHEMA, "strict": True}
    answer = chat(
        client,
        QUESTIONS[1],
        response_format={"type": "json_schema", "json_schema": schema},
    )
    grammar = StructuredOutputsParams(json=SCHEMA)
    expected = offline(plain, QUESTIONS[1], structured_outputs=grammar)
    assert answer.choices[0].message.content == expected
    assert expected.startswith("{")


@pytest.mark.parametrize(
    "refused",
    [{"min_p": 1.2, "temperature": 0.9}, {"temperature": -1.0}, {"max_tokens": 10_000}],
    ids=json.dumps,
)
def test_bad_requests_do_not_harm_the_server(
    client: openai.OpenAI, plain: Engine, refused: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, QUESTIONS[0], extra_body=refused)
    answer = chat(client, QUESTIONS[3])
    assert answer.choices[0].message.content == offline(plain, QUESTIONS[3])


def test_a_client_that_hangs_up(client: openai.OpenAI, plain: Engine) -> None:
    stream = chat(client, QUESTIONS[2], stream=True, max_tokens=400)
    next(iter(stream))
    stream.close()
    answer = chat(client, QUESTIONS[2])
    assert answer.choices[0].message.content == offline(plain, QUESTIONS[2])


def chat_body(**params: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": QUESTIONS[2]}]
    return {"model": "tiny", "messages": messages, "temperature": 0.0} | params


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"Hi"',
    b"\xff\xfe{}",
    b"[" * 5000,
    *(
        json.dumps(chat_body(**wrong)).encode()
        for wrong in (
            {"messages": "Hi"},
            {"messages": [{"role": 3}]},
            {"temperature": "hot"},
            {"temperature": float("nan")},
            {"max_tokens": "many"},
            {"max_tokens": -1},
            {"n": 0},
            {"n": 10**9},
            {"seed": 2**70},
            {"seed": 0.5},
            {"min_p": "little"},
            {"min_p": float("nan")},
            {"logit_bias": {"x": 1.0}},
            {"logit_bias": {"99999": 1.0}},
            {"logit_bias": [1]},
            {"stop": 5},
            {"stop_token_ids": ["x"]},
            {"logprobs": True, "top_logprobs": -5},
            {"response_format": {"type": "nonsense"}},
            {"structured_outputs": {"regex": "("}},
            {"structured_outputs": {"json": "{"}},
            {"stream_options": "all"},
        )
    ),
]


def test_malformed_requests(url: str, client: openai.OpenAI, plain: Engine) -> None:
    statuses = {}
    for body in MALFORMED:
        connection = http.client.HTTPConnection(*address_of(url), timeout=60)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        statuses[body] = connection.getresponse().status
        connection.close()
    not_refused = {b: status for b, status in statuses.items() if status // 100 != 4}
    assert not not_refused
    assert chat(client, QUESTIONS[3]).choices[0].message.content == offline(
        plain, QUESTIONS[3]
    )


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    return host, int(port)


def test_hundreds_of_clients_that_hang_up(
    url: str, client: openai.OpenAI, plain: Engine
) -> None:
    """Before they have asked, with half a question, and in the middle of the answer."""
    rng = random.Random(7)
    body = json.dumps(chat_body(stream=True, max_tokens=300)).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: tiny\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    question = head.encode() + body
    open_ones: list[socket.socket] = []
    for _ in range(400):
        connection = socket.create_connection(address_of(url), timeout=60)
        open_ones.append(connection)
        share = rng.choice((0.0, rng.random(), 1.0, 1.0))
        connection.sendall(question[: int(share * len(question))])
        if share == 1.0 and rng.random() < 0.4:
            while b"data: " not in (received := connection.recv(4096)):
                assert received, "the server has hung up"
        if rng.random() < 0.3:
            connection.shutdown(socket.SHUT_WR)
        if len(open_ones) > 20:
            hang_up(open_ones.pop(rng.randrange(20)), abruptly=rng.random() < 0.5)
    for connection in open_ones:
        hang_up(connection, abruptly=False)

    deadline = time.monotonic() + 60
    counters: Counter[str] = Counter({"vllm:num_requests_running": 1})
    # Gauges are those of the last step, so there has to be one.
    while counters["vllm:num_requests_running"] and time.monotonic() < deadline:
        answer = chat(client, QUESTIONS[2])
        assert answer.choices[0].message.content == offline(plain, QUESTIONS[2])
        counters = exported(url)
    assert counters["vllm:num_requests_running"] == 0
    assert counters["vllm:num_requests_waiting"] == 0
    assert counters["vllm:kv_cache_usage_perc"] == 0.0


def hang_up(connection: socket.socket, abruptly: bool) -> None:
    if abruptly:  # a reset instead of an orderly end
        at_once = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    connection.close()


def exported(url: str) -> Counter[str]:
    """Sums of all series on ``/metrics``, by the names that queries ask for."""
    address = url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(address, timeout=30) as response:
        families = list(text_string_to_metric_families(response.read().decode()))
    parts = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    found: Counter[str] = Counter()
    for family in families:
        # Of a counter whose labels were never seen there is no sample yet.
        found.update({family.name + end: 0 for end in parts.get(family.type, [""])})
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def test_counters_are_exported(client: openai.OpenAI, url: str) -> None:
    chat(client, QUESTIONS[0])
    counters = exported(url)
    drafts = counters["vllm:spec_decode_num_drafts_total"]
    nodes = counters["vllm:spec_decode_num_draft_tokens_total"]
    assert 0 < drafts <= nodes
    # vLLM does not count what a grammar forbids, nor requests that are gone when their
    # step has been verified.
    assert counters["vllm:clover2_accepted_depth_count"] >= drafts
    assert counters["vllm:clover2_verified_nodes_total"] >= nodes
    accepted = counters["vllm:spec_decode_num_accepted_tokens_total"]
    assert counters["vllm:clover2_accepted_nodes_total"] >= accepted
    assert counters["vllm:clover2_request_steps_total"] >= drafts
    for seconds in ("drafting", "verification"):
        assert counters[f"vllm:clover2_{seconds}_seconds_sum"] > 0.0


def test_the_dashboard_shows_what_is_exported(url: str) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    shown = {name for query in queries for name in re.findall(r"vllm:\w+", query)}
    names = set(exported(url))
    assert shown <= names
    end = re.compile(r"_(total|bucket|sum|count|created)$")
    ours = {end.sub("", name) for name in names if name.startswith("vllm:clover2_")}
    assert len(ours) == 10
    assert ours <= {end.sub("", name) for name in shown}


def test_json_options_and_tools(
    environment: Path, target: Path, head: Path, plain: Engine
) -> None:
    options = {"method": "clover2", "model": str(head), "tree": "static"}
    flags = ["--speculative-config", json.dumps(options)]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "pythonic"]
    log = environment / "json-options.log"
    function = {"name": "register", "parameters": SCHEMA}
    with server([*arguments(target), *flags], log) as address:
        client = openai.OpenAI(base_url=address, api_key="none", timeout=120)
        answer = chat(client, QUESTIONS[4])
        called = chat(
            client,
            QUESTIONS[4],
            tools=[{"type": "function", "function": function}],
            tool_choice={"type": "function", "function": {"name": "register"}},
        )
    assert answer.choices[0].message.content == offline(plain, QUESTIONS[4])
    assert "tree='static'" in log.read_text()
    (call,) = called.choices[0].message.tool_calls
    assert call.function.name == "register"
    grammar = StructuredOutputsParams(json=SCHEMA)
    assert call.function.arguments == offline(
        plain, QUESTIONS[4], structured_outputs=grammar
    )


def test_server_without_a_head_says_which_are_known(
    environment: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CLOVER2_HEADS", str(environment / "no-heads.json"))
    flags = ["--speculative-model", "clover2"]
    log = environment / "no-head.log"
    with (
        pytest.raises(RuntimeError, match="no Clover-2 head is known"),
        server([*arguments(target), *flags], log),
    ):
        pass
