# SPDX-License-Identifier: Apache-2.0
"""After any number of rounds the caches are those of a fresh pass over the text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import Baseline, random_prompts
from engines import Engine, EnginePool, Request, first_difference
from planting import CommitSpy, Planter, with_truth
from tiny_models import save_other_target
from transformers import AutoModelForCausalLM
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_clover2 import ops
from vllm_clover2.integration import step as step_module
from vllm_clover2.integration.attention import kv_layout
from vllm_clover2.model import DraftCache
from vllm_clover2.model.weights import load_head
from vllm_clover2.ops.layout import read_tokens

# float32 sums of a few hundred terms of size 1, in another order, four layers deep.
TOLERANCE = 2e-4


def cached_kv(engine: Engine, request_id: str) -> dict[str, torch.Tensor]:
    """K and V [2, positions, heads, D] of a running request, by layer."""
    runner = engine.runner
    (key,) = (i for i in runner.requests if i.startswith(request_id))
    request = runner.requests[key]
    layers = get_layers_from_vllm_config(runner.vllm_config, Attention)
    positions = torch.arange(request.num_tokens - 1)  # the last token has no KV yet
    kv = {}
    groups = runner.kv_cache_config.kv_cache_groups
    for group, blocks in zip(groups, request.block_ids, strict=True):
        block_size = group.kv_cache_spec.block_size
        slots = torch.tensor(blocks)[positions // block_size] * block_size
        slots += positions % block_size
        for name in group.layer_names:
            layer = layers[name]
            tokens = read_tokens(layer.kv_cache, kv_layout(layer), slots)
            kv[name] = torch.stack(tokens)
    return kv


def text_of(engine: Engine, request_id: str) -> list[int]:
    requests = engine.runner.requests
    (key,) = (i for i in requests if i.startswith(request_id))
    return [*requests[key].prompt_token_ids, *requests[key].output_token_ids]


def waiting_rows(engine: Engine, request_id: str) -> int:
    """Rows of the text for which the head was not asked yet."""
    (key,) = (i for i in engine.runner.requests if i.startswith(request_id))
    (rows,) = engine.runner.drafting.backlog.sizes([key])
    assert rows >= 0
    return int(rows)


def running(engine: Engine) -> list[str]:
    """Requests that are past their prompt and not finished."""
    return [r.request_id for r in engine.scheduler.running if r.num_output_tokens]


@pytest.fixture
def clean(engines: EnginePool) -> Iterator[Callable[[Engine], None]]:
    """Leaves no running request behind in a shared engine."""
    used: list[Engine] = []
    yield used.append
    for engine in used:
        while engine.busy:
            engine.step()


@pytest.mark.parametrize("budget", [2048, 64], ids=["whole-prompts", "chunked"])
def test_caches_equal_those_of_a_fresh_pass(
    budget: int,
    engines: EnginePool,
    target: Path,
    head: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    commits: CommitSpy,
    clean: Callable[[Engine], None],
) -> None:
    requests = [r.replaced(max_tokens=90) for r in random_prompts(6, seed=70)]
    options = {"block_size": 32, "max_num_batched_tokens": budget}
    if budget == 64:
        options["max_num_seqs"] = 8
    engine = engines.get(target, head, **options)
    fresh = engines.get(target, enable_prefix_caching=False)
    clean(engine)
    clean(fresh)
    plant(seed=70)
    ids = [engine.add(r) for r in with_truth(requests, baseline(requests))]
    while commits.paths.total() < 8 * len(ids):  # verified trees
        engine.step()
    assert commits.moved > 20
    assert_fresh(engine, fresh, target, head)


def test_caches_behind_a_window(
    engines: EnginePool,
    head: Path,
    plant: Callable[..., Planter],
    commits: CommitSpy,
    clean: Callable[[Engine], None],
    tmp_path: Path,
) -> None:
    """The target's layers see 40 tokens, the draft's all of them."""
    mistral = {"model_type": "mistral", "sliding_window": 40}
    target = save_other_target(tmp_path, mistral)
    options: dict[str, Any] = {"skip_tokenizer_init": True}
    fresh = engines.get(target, enable_prefix_caching=False, **options)
    options |= {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    engine = engines.get(target, head, block_size=32, **options)
    assert len(engine.runner.kv_cache_config.kv_cache_groups) == 3
    clean(engine)
    clean(fresh)
    requests = [r.replaced(max_tokens=200) for r in random_prompts(6, seed=72)]
    expected = fresh.run(requests)
    plant(seed=72)
    for request in with_truth(requests, expected):
        engine.add(request)
    for _ in range(40):
        engine.step()
    assert commits.moved > 100
    assert_fresh(engine, fresh, target, head, last=39)


def assert_fresh(
    engine: Engine,
    plain: Engine,
    target: Path,
    head: Path,
    last: int = 0,  # positions of the target's that are compared, 0: all
) -> None:
    """The engine's running requests have the KV of a fresh pass over their text."""
    draft_layers = engine.runner.drafter._draft_attn_layer_names
    compared = 0
    for request_id in running(engine):
        text = text_of(engine, request_id)
        ours = cached_kv(engine, request_id)
        expected = fresh_kv(plain, text)
        for name, kv in expected.items():
            torch.testing.assert_close(
                ours[name][:, -last:], kv[:, -last:], atol=TOLERANCE, rtol=TOLERANCE
            )
        draft = recomputed_draft_kv(target, head, text)
        assert len(draft) == len(draft_layers) == 2
        written = len(text) - 1 - waiting_rows(engine, request_id)
        for name, kv in zip(sorted(draft_layers), draft, strict=True):
            torch.testing.assert_close(
                ours[name][:, :written],
                kv[:, :written],
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )
        compared += 1
    assert compared >= 3


def fresh_kv(engine: Engine, text: list[int]) -> dict[str, torch.Tensor]:
    """KV of ``text`` without its last token, computed in one prefill."""
    request_id = engine.add(Request(tuple(text[:-1]), {"max_tokens": 2}))
    engine.step()
    kv = cached_kv(engine, request_id)
    engine.abort(request_id)
    return kv


@torch.inference_mode()
def recomputed_draft_kv(
    target: Path, head: Path, text: list[int]
) -> list[torch.Tensor]:
    """K and V [2, positions, heads, D] of every draft layer, by the plain model."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    hidden: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    tokens = torch.tensor([text])
    model(tokens[:, :-1])
    cache = DraftCache()
    embeddings = model.lm_head.weight[tokens[:, 1:]]
    load_head(head).augment(hidden[0], embeddings, cache=cache)
    return [
        torch.stack([key[0].transpose(0, 1), value[0].transpose(0, 1)])
        for key, value in zip(cache.keys, cache.values, strict=True)
    ]


def test_without_commit_the_text_differs(
    engines: EnginePool,
    target: Path,
    head: Path,
    baseline: Baseline,
    plant: Callable[..., Planter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: the lossless tests do see a missing move."""

    class OpsWithoutCommit:
        def __getattr__(self, name: str) -> object:
            return getattr(ops, name)

        def commit_kv(self, *args: object) -> None:
            pass

    monkeypatch.setattr(step_module, "ops", OpsWithoutCommit())
    requests = random_prompts(8, seed=71)
    expected = baseline(requests)
    # Without prefix caching: the wrong blocks must not reach other tests.
    engine = engines.get(target, head, enable_prefix_caching=False)
    plant(seed=71)
    actual = engine.run(with_truth(requests, expected))
    left_at = [
        first_difference(plain.tokens, ours.tokens)
        for plain, ours in zip(expected, actual, strict=True)
        if plain.tokens != ours.tokens
    ]
    assert len(left_at) >= 6
    assert min(left_at) < 20
