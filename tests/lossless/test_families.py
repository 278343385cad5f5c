# SPDX-License-Identifier: Apache-2.0
"""Every family of targets with a tree, with a chain and without a head.

Each is a small model with random weights, and its text is compared with plain vLLM's.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from engine_fixtures import random_prompts
from engines import Engine, EnginePool, Output, assert_same
from families import FAMILIES, UNTESTED, Family
from planting import CommitSpy, Planter, with_truth
from tiny_models import other_config, save_other_target
from vllm.distributed import parallel_state
from vllm.model_executor.models import registry

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "block_size": 32,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 8 << 20,
}
REQUESTS = random_prompts(6, seed=170, longest=60)
REQUESTS += [r.replaced(temperature=0.8, seed=7) for r in random_prompts(2, 171, 60)]
CHAIN = {"tree": "chain", "num_speculative_tokens": 5, "adaptive": False}
NO_HEAD = Path("none")


@pytest.fixture(scope="module", autouse=True)
def vllm_in_one_process(plain: Engine) -> Iterator[None]:
    """What vLLM does once in a process, done for all families.

    Classes are imported here, not in processes of their own lest they start CUDA. And
    the group of processes that experts are spread over was not made for ``plain``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        patch.setattr(parallel_state, "_EP", parallel_state.get_tp_group())
        yield


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.title)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.fixture(scope="module")
def tiny(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of this family; its config alone if it is not going to be loaded."""
    folder = tmp_path_factory.mktemp("family")
    config = {
        "model_type": family.model_type,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    } | family.config
    if family.no_chain:
        loaded = other_config(config)
        loaded.architectures = family.classes[:1]
        loaded.save_pretrained(folder)
        return folder
    return save_other_target(folder, config, family.embeddings)


@pytest.fixture(scope="module")
def expected(family: Family, tiny: Path, engines: EnginePool) -> list[Output]:
    outputs = engines.get(tiny, **OPTIONS, **family.options).run(REQUESTS)
    assert len({token for o in outputs[:6] for token in o.tokens}) > 60
    return outputs


@pytest.mark.parametrize("mode", ["tree", "chain", "none"])
def test_what_is_served(
    mode: str,
    family: Family,
    tiny: Path,
    engines: EnginePool,
    head: Path,
    plant: Callable[..., Planter],
    commits: CommitSpy,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    chain = mode == "chain" or (mode == "none" and family.no_tree is not None)

    def start() -> Engine:
        return engines.get(
            tiny,
            NO_HEAD if mode == "none" else head,
            CHAIN if chain else {},
            **OPTIONS,
            **family.options,
        )

    if reason := family.refusal(mode):
        with pytest.raises(ValueError, match=re.escape(reason)) as error:
            start()
        assert "does not support this configuration" in str(error.value)
        return
    expected = request.getfixturevalue("expected")
    engine = start()
    if mode != "none":
        check_head_states(engine, monkeypatch)
    plant(seed=170, chain=chain, hit_rate=0.9 if chain else 0.35)
    actual = engine.run(with_truth(REQUESTS, expected))
    assert_same(expected, actual, REQUESTS)
    assert engine.runner.drafts.counts["accepted, head"] > 5 * len(REQUESTS)
    assert (commits.moved > len(REQUESTS)) == (not chain)


def check_head_states(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the target's final norm, what a head gets must be what the lm_head gets."""
    norm = final_norm(engine.runner.get_model())
    after_norm: list[torch.Tensor] = []

    def remember(_module: Any, _inputs: Any, output: Any) -> None:
        after_norm.append(output[0] if isinstance(output, tuple) else output)

    norm.register_forward_hook(remember)
    stock = engine.runner._finished_step

    def finished_step(sampled: Any, states: torch.Tensor, attention: Any) -> Any:
        norm(states)
        *_, expected, actual = after_norm
        after_norm.clear()
        torch.testing.assert_close(actual, expected.view_as(actual))
        return stock(sampled, states, attention)

    monkeypatch.setattr(engine.runner, "_finished_step", finished_step)


def final_norm(target: torch.nn.Module) -> torch.nn.Module:
    norms = [
        module
        for name, module in target.model.named_children()
        if "norm" in name or name == "ln_f"
    ]
    return norms[-1]


def test_every_class_is_in_a_table() -> None:
    """Of those that vLLM can take intermediate hidden states from."""
    bases: dict[str, set[str]] = {}
    root = Path(vllm.__file__).parent
    for folder in (root / "model_executor/models", root / "models"):
        for path in folder.rglob("*.py"):
            for name, listed in re.findall(
                r"^class (\w+)\(([^)]*)\)", path.read_text(), re.MULTILINE
            ):
                bases.setdefault(name, set()).update(re.findall(r"\w+", listed))

    able = {"SupportsEagle3"}
    while more := {name for name, of in bases.items() if of & able} - able:
        able |= more
    known = registry._TEXT_GENERATION_MODELS | registry._TRANSFORMERS_SUPPORTED_MODELS
    expected = {
        name
        for name, (_, implementation) in known.items()
        if name.endswith("ForCausalLM") and implementation in able
    }
    tested = {name for family in FAMILIES for name in family.classes}
    untested = {f"{n}ForCausalLM" for names in UNTESTED.values() for n in names.split()}
    assert not tested & untested
    assert tested | untested == expected
