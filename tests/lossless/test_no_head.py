# SPDX-License-Identifier: Apache-2.0
"""``"model": "none"``: plain vLLM's text, with drafts from a request's own text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_fixtures import Baseline, random_prompts, repeated_prompts
from engines import EnginePool, Request, assert_same
from transformers import GPT2Config, GPT2LMHeadModel
from vllm.model_executor.models.interfaces import supports_eagle3
from vllm.sampling_params import StructuredOutputsParams

NO_HEAD = Path("none")
ALWAYS = {"adaptive": False}  # what is drafted does not depend on the machine
TREES = {
    "dynamic": ALWAYS,
    "adaptive": {},
    "chain": {"tree": "chain", **ALWAYS},
    "small": {"num_speculative_tokens": 3, **ALWAYS},
}


def accepted_context(engine: Any) -> int:
    counts = engine.runner.drafts.counts
    assert counts["verified, head"] == counts["verified, both"] == 0
    return counts["accepted, context"]


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("name", TREES)
def test_greedy_text(
    name: str, concurrency: int, engines: EnginePool, repeating: Path
) -> None:
    requests = repeated_prompts(8 + concurrency, seed=140)
    expected = engines.get(repeating).run(requests)
    engine = engines.get(repeating, NO_HEAD, TREES[name])
    before = accepted_context(engine)
    assert_same(expected, engine.run(requests, concurrency), requests)
    if name != "adaptive":
        assert accepted_context(engine) - before > len(requests)


def test_seeded_samples(engines: EnginePool, repeating: Path) -> None:
    requests = [
        request.replaced(seed=i, temperature=0.1 + 0.1 * (i % 4), top_p=0.9)
        for i, request in enumerate(repeated_prompts(16, seed=141))
    ]
    expected = engines.get(repeating).run(requests)
    engine = engines.get(repeating, NO_HEAD, ALWAYS)
    before = accepted_context(engine)
    assert_same(expected, engine.run(requests), requests)
    assert accepted_context(engine) > before


def test_planted_trees(
    engines: EnginePool,
    target: Path,
    baseline: Baseline,
    assert_exact: Callable[..., None],
) -> None:
    """Trees of all shapes, accepted and moved."""
    requests = random_prompts(24, seed=142)
    engine = engines.get(target, NO_HEAD)
    assert_exact(engine, requests, baseline(requests), seed=142)


def test_prefix_cache_gives_all_blocks(engines: EnginePool, repeating: Path) -> None:
    """A head makes vLLM compute the last block again, for its hidden states."""
    first = repeated_prompts(6, seed=143)
    options = {"block_size": 32}
    plain = engines.get(repeating, **options)
    ours = engines.get(repeating, NO_HEAD, ALWAYS, **options)
    texts = plain.run(first)
    assert_same(texts, ours.run(first), first)
    again = [
        Request((*request.prompt, *text.tokens[:cut], 77))
        for request, text in zip(first, texts, strict=True)
        for cut in (20, 28, 40)
    ]
    expected, actual = plain.run(again), ours.run(again)
    assert_same(expected, actual, again)
    cached = [output.cached_tokens for output in expected]
    assert [output.cached_tokens for output in actual] == cached
    assert min(cached) >= 32
    assert max(cached) >= 64


def test_structured_output_is_drafted_as_chains(
    engines: EnginePool, repeating: Path
) -> None:
    regex = StructuredOutputsParams(regex=r"(red green (dark|light) ){5}")
    requests = [
        request.replaced(structured_outputs=regex, ignore_eos=False)
        for request in repeated_prompts(4, seed=144)
    ] + repeated_prompts(4, seed=145)
    expected = engines.get(repeating).run(requests)
    engine = engines.get(repeating, NO_HEAD, ALWAYS)
    counts = engine.runner.drafts.counts
    reason = "structured output: drafted as a chain"
    seen, before = counts[reason], accepted_context(engine)
    assert_same(expected, engine.run(requests), requests)
    assert counts[reason] > seen
    assert accepted_context(engine) > before


def test_a_target_that_no_head_could_be_trained_for(
    engines: EnginePool, assert_exact: Callable[..., None], tmp_path: Path
) -> None:
    """vLLM's GPT-2 hands out no hidden states; its positions are learned."""
    shape = {"n_embd": 128, "n_layer": 3, "n_head": 4, "initializer_range": 0.3}
    config = GPT2Config(vocab_size=512, bos_token_id=1, eos_token_id=2, **shape)
    GPT2LMHeadModel(config).float().save_pretrained(tmp_path)
    options = {"skip_tokenizer_init": True}
    requests = random_prompts(12, seed=146)
    expected = engines.get(tmp_path, **options).run(requests)
    engine = engines.get(tmp_path, NO_HEAD, **options)
    assert not supports_eagle3(engine.runner.get_model())
    assert_exact(engine, requests, expected, seed=146)


def test_nothing_of_a_head_is_there(engines: EnginePool, target: Path) -> None:
    plain = engines.get(target).runner
    engine = engines.get(target, NO_HEAD)
    layers = engine.runner.compilation_config.static_forward_context
    assert list(layers) == list(plain.compilation_config.static_forward_context)
    assert not engine.runner.use_aux_hidden_state_outputs
    assert not engine.scheduler.use_eagle
    assert engine.scheduler.num_lookahead_tokens == 0
    (parts,) = engine.llm.collective_rpc("clover2_part_milliseconds")
    assert list(parts) == ["target_1", "target_26"]
    (steps,) = engine.llm.collective_rpc("clover2_step_milliseconds")
    assert steps[1] > 0.0
