# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM serves our EAGLE-1 heads, and accepts what the offline replay counts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import TINY, random_prompts
from engines import Engine, EnginePool, Output, Request, assert_same
from test_metrics import spec_decode_metrics
from tiny_models import save_target
from transformers import LlamaForCausalLM

from vllm_clover2.model import Eagle1Config, Eagle1Model
from vllm_clover2.model.eagle1 import load_eagle1, save_eagle1
from vllm_clover2.train.config import EvaluateConfig
from vllm_clover2.train.data import pack, read_answers
from vllm_clover2.train.eagle1 import Eagle1Replay
from vllm_clover2.train.evaluate import evaluate
from vllm_clover2.train.hidden import Target
from vllm_clover2.tree import chain, grow_static

pytestmark = pytest.mark.slow

DEPTH = 3
# Of the target's embeddings, which are otherwise lost between its wide layers: half of
# its choices follow from the last token alone, and the others do not.
EMBEDDING_SCALE = 3000.0


@pytest.fixture(scope="module")
def bigram_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target whose choice depends on its last token a lot, and on the rest a bit."""
    folder = save_target(tmp_path_factory.mktemp("bigram"), TINY)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data.mul_(EMBEDDING_SCALE)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eagle_head(bigram_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head that passes the token's embedding on, disturbed by its own layer."""
    torch.manual_seed(5)
    model = Eagle1Model(
        Eagle1Config(
            vocab_size=TINY.vocab_size,
            hidden_size=TINY.hidden_size,
            intermediate_size=2 * TINY.hidden_size,
            num_attention_heads=TINY.num_heads,
            num_key_value_heads=TINY.num_kv_heads,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            training={"settings": {"seed": 5}},  # ours, which vLLM has to ignore
            target={"name": "tiny"},
        )
    )
    with torch.no_grad():
        for name, weight in model.layers.named_parameters():
            if weight.ndim == 2:
                # Sharp attention: wrong keys or positions must show.
                sharp = "q_proj" in name or "k_proj" in name
                weight.normal_(std=0.3 if sharp else 0.06)
        embedding, feature = model.fc.weight.zero_().chunk(2, dim=1)
        # Features are as large as post-norm states: 1.
        embedding.diagonal().fill_(1 / (TINY.init * EMBEDDING_SCALE))
        feature.diagonal().fill_(0.2)
    folder = tmp_path_factory.mktemp("eagle-head")
    save_eagle1(model, folder, torch.float32)
    return folder


def write_answers(path: Path, requests: list[Request], outputs: list[Output]) -> Path:
    with path.open("w") as lines:
        for request, output in zip(requests, outputs, strict=True):
            record: dict[str, Any] = {
                "prompt_token_ids": list(request.prompt),
                "output_token_ids": output.tokens,
            }
            lines.write(json.dumps(record) + "\n")
    return path


@pytest.fixture(scope="module")
def engine(engines: EnginePool, bigram_target: Path, eagle_head: Path) -> Engine:
    """Stock speculation; its counters are this process's, as the newest engine's."""
    engine = engines.get(
        bigram_target,
        speculative_config={
            "method": "eagle",
            "model": str(eagle_head),
            "num_speculative_tokens": DEPTH,
        },
        disable_log_stats=False,
    )
    assert type(engine.runner.drafter).__name__ == "EagleProposer"
    return engine


def test_vllm_accepts_what_the_replay_counts(
    engines: EnginePool,
    engine: Engine,
    bigram_target: Path,
    eagle_head: Path,
    tmp_path: Path,
) -> None:
    requests = random_prompts(16, seed=31)
    expected = engines.get(bigram_target).run(requests)
    before = spec_decode_metrics(engine)
    actual = engine.run(requests)
    assert_same(expected, actual, requests)
    after = spec_decode_metrics(engine)
    steps, by_depth = (
        np.array(after[name]) - np.array(before[name])
        for name in (
            "vllm:spec_decode_num_drafts",
            "vllm:spec_decode_num_accepted_tokens_per_pos",
        )
    )

    replayed = evaluate(
        EvaluateConfig(
            target=str(bigram_target),
            head=eagle_head,
            answers=write_answers(tmp_path / "answers.jsonl", requests, actual),
            trees=[f"chain:{DEPTH}"],
            precision="fp32",
        )
    )[f"chain:{DEPTH}"]
    assert replayed["steps"] == steps
    ours = np.array(replayed["acceptance_by_depth"]) * steps
    # Some of everything, or nothing is compared.
    assert 0.02 * steps < ours[-1] < ours[0] < 0.9 * steps
    # vLLM also counts what it accepts in an answer's last step and cuts off.
    beyond = by_depth - ours
    assert (beyond > -0.5).all()
    assert beyond.sum() < DEPTH * len(requests)
    emitted = sum(len(output.tokens) for output in actual) - len(requests)
    assert replayed["tokens_per_step"] == pytest.approx(emitted / steps, abs=1e-3)


@torch.inference_mode()
def test_vllm_drafts_the_tokens_that_the_replay_drafts(
    engine: Engine,
    bigram_target: Path,
    eagle_head: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drafted: list[list[int]] = []
    propose = engine.runner.drafter.propose

    def recording(*arguments: Any, **named: Any) -> torch.Tensor:
        tokens = propose(*arguments, **named)
        drafted.append(tokens[0].tolist())
        return tokens

    monkeypatch.setattr(engine.runner.drafter, "propose", recording)
    requests = random_prompts(6, seed=32)
    calls, outputs = [], []
    for request in requests:
        outputs.extend(engine.run([request]))
        calls.append(list(drafted))
        drafted.clear()

    path = write_answers(tmp_path / "answers.jsonl", requests, outputs)
    answers = read_answers(path, TINY.vocab_size)
    batch = pack(answers, np.arange(len(requests)))
    target = Target.load(str(bigram_target), torch.float32, torch.device("cpu"))
    states = target.states(batch)
    replay = Eagle1Replay(load_eagle1(eagle_head), target, states, batch)
    for number, proposals in enumerate(calls):
        text = answers.answer(number).tolist()
        root = int(answers.prompt_lens[number])
        while root < len(text) - 1:
            found = proposals.pop(0)
            draft = replay.at(torch.tensor([number]), torch.tensor([root]))
            assert found == grow_static(*draft, chain(DEPTH)).tokens[0].tolist(), root
            accepted = [a == b for a, b in zip(found, text[root + 1 :], strict=False)]
            root += [*accepted, False].index(False) + 1
