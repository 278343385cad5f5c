# SPDX-License-Identifier: Apache-2.0
"""Targets with sliding windows, in one KV group and in several."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import TINY, random_prompts
from engines import Engine, EnginePool, Request, assert_same
from planting import CommitSpy, Planter, with_truth
from tiny_models import save_other_target, save_random_head

from vllm_clover2 import ops
from vllm_clover2.integration import attention

WINDOW = 40  # neither a multiple of a block nor a part of one
NO_HEAD = Path("none")
OPTIONS: dict[str, Any] = {"skip_tokenizer_init": True, "block_size": 32}

SLIDING, FULL = "sliding_attention", "full_attention"
MISTRAL = {"model_type": "mistral", "sliding_window": WINDOW}
QWEN2 = {
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 0,
}
# vLLM's Llama knows layers of two kinds, as those of Ministral.
ALTERNATING = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "sliding_window": WINDOW,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW}
GEMMA2 = GEMMA | {"model_type": "gemma2", "num_hidden_layers": 4}
GEMMA3 = GEMMA | {
    "model_type": "gemma3_text",
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    "tie_word_embeddings": False,
}
ONE_GROUP = {"disable_hybrid_kv_cache_manager": True}


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_other_target(tmp_path_factory.mktemp("mistral"), MISTRAL)


def long_requests(count: int, seed: int) -> list[Request]:
    return [r.replaced(max_tokens=100) for r in random_prompts(count, seed)]


@pytest.mark.parametrize(
    ("config", "has_head", "groups", "options"),
    [
        (MISTRAL, True, 3, {}),
        (MISTRAL, False, 1, {}),
        (QWEN2, True, 3, {}),
        (ALTERNATING, True, 2, {}),
        (ALTERNATING, True, 1, ONE_GROUP),
        (GEMMA2, False, 2, {}),
        (GEMMA3, False, 4, {}),
    ],
    ids=[
        "mistral",
        "mistral-no-head",
        "qwen2",
        "alternating",
        "alternating-one-group",
        "gemma2",
        "gemma3",
    ],
)
def test_planted_trees(
    config: dict[str, Any],
    has_head: bool,
    groups: int,
    options: dict[str, Any],
    engines: EnginePool,
    head: Path,
    assert_exact: Callable[..., None],
    tmp_path: Path,
) -> None:
    # Gemma's embeddings are its output head: as large as they are scaled up to be, a
    # token would follow itself.
    embeddings = 0.05 if config is GEMMA2 else 1.0
    target = save_other_target(tmp_path, config, embeddings)
    requests = long_requests(8, seed=150)
    requests += [r.replaced(temperature=0.8, seed=7) for r in long_requests(3, 151)]
    expected = engines.get(target, **OPTIONS).run(requests)
    assert len({token for o in expected[:8] for token in o.tokens}) > 100
    engine = engines.get(target, head if has_head else NO_HEAD, **OPTIONS, **options)
    assert len(engine.runner.kv_cache_config.kv_cache_groups) == groups
    assert_exact(engine, requests, expected, seed=150)


def test_without_its_window_the_text_differs(
    engines: EnginePool,
    mistral: Path,
    head: Path,
    plant: Callable[..., Planter],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: these texts do depend on what tree attention hides."""

    class OpsWithoutWindow:
        def __getattr__(self, name: str) -> object:
            return getattr(ops, name)

        def tree_attention(
            self, *args: Any, sliding_window: int, **options: Any
        ) -> None:
            assert sliding_window == WINDOW
            ops.tree_attention(*args, **options)

    requests = long_requests(8, seed=152)
    expected = engines.get(mistral, **OPTIONS).run(requests)
    # Without prefix caching: the wrong blocks must not reach other tests.
    engine = engines.get(mistral, head, enable_prefix_caching=False, **OPTIONS)
    plant(seed=152)
    monkeypatch.setattr(attention, "ops", OpsWithoutWindow())
    actual = engine.run(with_truth(requests, expected))
    differ = [a.tokens != b.tokens for a, b in zip(expected, actual, strict=True)]
    assert sum(differ) >= 6


@pytest.fixture
def poisoned() -> Iterator[Callable[[Engine], list[torch.Tensor]]]:
    """Fills an engine's null block with NaN, and returns it, layer by layer."""
    blocks: list[torch.Tensor] = []

    def poison(engine: Engine) -> list[torch.Tensor]:
        layers = engine.runner.compilation_config.static_forward_context.values()
        blocks.extend(layer.kv_cache[0].fill_(torch.nan) for layer in layers)
        return blocks

    yield poison
    for block in blocks:
        block.zero_()


def test_prompts_found_in_the_cache_have_null_blocks(
    engines: EnginePool,
    mistral: Path,
    head: Path,
    plant: Callable[..., Planter],
    commits: CommitSpy,
    poisoned: Callable[[Engine], list[torch.Tensor]],
) -> None:
    """What left the window has no block of its own; the null block is left alone."""
    prompts = random_prompts(24, seed=153, longest=300)
    requests = [r.replaced(max_tokens=80) for r in prompts if len(r.prompt) > 160]
    expected = engines.get(mistral, **OPTIONS).run(requests)
    engine = engines.get(mistral, head, **OPTIONS)
    plant(seed=153)
    planted = with_truth(requests, expected)
    assert_same(expected, engine.run(planted), requests)
    moved = commits.moved

    null_blocks = poisoned(engine)
    ids = [engine.add(request) for request in planted]
    engine.step()
    groups = engine.runner.kv_cache_config.kv_cache_groups
    tables = engine.runner.input_batch.block_table
    first_blocks = {
        (type(group.kv_cache_spec).__name__, block > 0)
        for gid, group in enumerate(groups)
        for block in tables[gid].get_cpu_tensor()[: len(requests), 0].tolist()
    }
    assert first_blocks == {("SlidingWindowSpec", False), ("FullAttentionSpec", True)}
    outputs = {}
    while engine.busy:
        outputs |= engine.step()
    actual = [outputs[request_id] for request_id in ids]
    assert_same(expected, actual, requests)
    assert min(o.cached_tokens for o in actual) > 2 * WINDOW
    assert commits.moved > moved
    assert all(block.isnan().all() for block in null_blocks)


@pytest.mark.parametrize("tree", [{}, {"tree": "chain"}], ids=["tree", "chain"])
def test_blocks_that_left_the_window_are_used_again(
    tree: dict[str, Any],
    engines: EnginePool,
    mistral: Path,
    head: Path,
    plant: Callable[..., Planter],
) -> None:
    """By other requests, while prompts are computed in parts and some start again."""
    requests = [
        r.replaced(max_tokens=60) for r in random_prompts(10, seed=154, longest=200)
    ]
    expected = engines.get(mistral, **OPTIONS).run(requests)
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
    engine = engines.get(
        mistral, head, tree, num_gpu_blocks_override=90, **options, **OPTIONS
    )
    plant(seed=154, chain=bool(tree))
    assert_same(expected, engine.run(with_truth(requests, expected)), requests)


def test_head_that_vllm_scatters(
    engines: EnginePool, head: Path, tmp_path: Path
) -> None:
    """With as many layers of each kind the head's go to two groups."""
    kinds = {"layer_types": [SLIDING, FULL, SLIDING, FULL]}
    target = save_other_target(tmp_path, ALTERNATING | kinds)
    with pytest.raises(ValueError, match="head whose 2 layers are in 2 groups of KV"):
        engines.get(target, head, **OPTIONS)


def test_head_whose_blocks_do_not_fit(
    engines: EnginePool,
    mistral: Path,
    assert_exact: Callable[..., None],
    tmp_path: Path,
) -> None:
    """vLLM would pad the target's; in one group blocks may differ in size."""
    head = save_random_head(tmp_path, TINY, num_key_value_heads=1, head_dim=96)
    reason = r"trees with padded blocks of KV \(3 layers\).*disable_hybrid"
    with pytest.raises(ValueError, match=reason):
        engines.get(mistral, head, **OPTIONS)
    requests = long_requests(4, seed=155)
    expected = engines.get(mistral, **OPTIONS).run(requests)
    engine = engines.get(mistral, head, **OPTIONS, **ONE_GROUP)
    assert_exact(engine, requests, expected, seed=155)
