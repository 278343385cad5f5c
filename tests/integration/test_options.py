# SPDX-License-Identifier: Apache-2.0
"""``speculative_config``: what is accepted, and what each mistake is told."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TinyModel, save_random_head
from vllm.config import VllmConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_clover2.integration import speculative_config


def engine_config(target: Path, speculative: Any, **options: Any) -> VllmConfig:
    args = EngineArgs(model=str(target), speculative_config=speculative, **options)
    return args.create_engine_config()


def clover2(head: Path, **tree: Any) -> dict[str, Any]:
    return {"method": "clover2", "model": str(head), **tree}


def test_defaults(target: Path, head: Path) -> None:
    config = engine_config(target, clover2(head))
    speculative = config.speculative_config
    assert speculative.method == "clover2"
    assert speculative.num_speculative_tokens == 25
    assert speculative.tree_options().tree == "dynamic"
    draft = speculative.draft_model_config.hf_config
    assert draft.eagle_aux_hidden_state_layer_ids == (TinyModel().num_layers,)
    assert config.parallel_config.worker_cls.startswith("vllm_clover2.")
    assert not config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("tree", "nodes"),
    [
        ({"tree": "static"}, 25),
        ({"tree": "static", "num_speculative_tokens": 9}, 9),
        ({"tree": "chain"}, 5),
        ({"tree": "chain", "num_speculative_tokens": 3}, 3),
        ({"tree": [[0], [1], [0, 0]]}, 3),
        ({"num_speculative_tokens": 63, "top_k": 10, "depth": 7, "top_p": 0.9}, 63),
    ],
    ids=json.dumps,
)
def test_options_reach_the_drafter(
    target: Path, head: Path, tree: dict[str, Any], nodes: int
) -> None:
    speculative = engine_config(target, clover2(head, **tree)).speculative_config
    assert speculative.num_speculative_tokens == nodes
    options = speculative.tree_options()
    assert options.num_nodes == nodes
    for name, value in tree.items():
        assert getattr(options, name) == value
    assert f"model='{head}'" in repr(speculative)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"num_speculative_tokens": 64}, "num_speculative_tokens: .*63"),
        ({"num_speculative_tokens": 0}, "greater than 0"),
        ({"depth": 0}, "depth: .*1"),
        ({"top_k": 0}, "top_k: .*1"),
        ({"top_p": 0.0}, "top_p: .*greater than 0"),
        ({"top_p": 1.5}, "top_p: .*less than or equal to 1"),
        ({"top_k": 1, "depth": 3, "context": False}, "at most 3"),
        ({"tree": "bushy"}, "tree"),
        ({"tree": []}, "1 to 63 nodes"),
        ({"tree": [[0, 0]]}, "parent of path"),
        ({"tree": [[0], [0]]}, "once"),
        ({"tree": [[-1]]}, "child ranks"),
        ({"tree": [[0]], "num_speculative_tokens": 2}, "at most the tree's 1"),
        ({"tree": "static", "num_speculative_tokens": 26}, "at most the tree's 25"),
        ({"branches": 3}, "branches"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
def test_bad_options(
    target: Path, head: Path, tree: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine_config(target, clover2(head, **tree))


@pytest.mark.parametrize(
    ("tree", "nodes"),
    [
        ({}, 25),
        ({"tree": "chain"}, 5),
        ({"tree": "chain", "depth": 7}, 7),
        ({"num_speculative_tokens": 9}, 9),
    ],
    ids=json.dumps,
)
def test_without_a_head(target: Path, tree: dict[str, Any], nodes: int) -> None:
    config = engine_config(target, {"method": "clover2", "model": "none", **tree})
    speculative = config.speculative_config
    assert (speculative.method, speculative.model) == ("clover2", "none")
    assert speculative.num_speculative_tokens == nodes
    assert not speculative.has_head
    assert not speculative.use_eagle()
    assert speculative.draft_model_config is speculative.target_model_config
    hf_config = speculative.target_model_config.hf_config
    assert not hasattr(hf_config, "eagle_aux_hidden_state_layer_ids")
    assert "model='none'" in repr(speculative)
    assert config.parallel_config.worker_cls.startswith("vllm_clover2.")
    assert not config.scheduler_config.async_scheduling


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"tree": "static"}, "context True and tree 'static'"),
        ({"tree": [[0], [1]]}, r"context True and tree \[\[0\], \[1\]\]"),
        ({"context": False}, "context False and tree 'dynamic'"),
        ({"context": False, "tree": "chain"}, "context False and tree 'chain'"),
    ],
    ids=json.dumps,
)
def test_without_a_head_the_text_must_be_drafted_from(
    target: Path, tree: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=f"the text is the only source.*{found}"):
        engine_config(target, {"method": "clover2", "model": "none", **tree})


@pytest.mark.parametrize(
    ("tree", "found"),
    [
        ({"top_k": 4, "depth": 3}, "top_k, depth"),
        ({"top_p": 0.9}, "top_p"),
        ({"tree": "chain", "depth": 3, "min_ratio": 0.1}, "min_ratio"),
    ],
    ids=json.dumps,
)
def test_without_a_head_its_options_are_refused(
    target: Path, tree: dict[str, Any], found: str
) -> None:
    with pytest.raises(ValueError, match=f"have no effect: {found}\\."):
        engine_config(target, {"method": "clover2", "model": "none", **tree})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 192}, "hidden_size must equal the target's 128.*192"),
        ({"vocab_size": 300}, "vocab_size must equal the target's 512.*300"),
    ],
    ids=["hidden-size", "vocabulary"],
)
def test_head_of_another_target(
    target: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    save_random_head(tmp_path, TinyModel(**changes))
    with pytest.raises(ValueError, match=message):
        engine_config(target, clover2(tmp_path))


def test_head_of_a_deeper_target(target: Path, tmp_path: Path) -> None:
    save_random_head(tmp_path, TinyModel(), aux_hidden_state_layers=[1, 4])
    with pytest.raises(ValueError, match=r"after \[1, 4\] .* must lie in 1\.\.3"):
        engine_config(target, clover2(tmp_path))


def test_a_model_that_is_no_head(target: Path) -> None:
    with pytest.raises(ValueError, match="must be 'clover2', found 'llama'"):
        engine_config(target, clover2(target))


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["none", "broken", "empty"])
def test_directory_without_a_usable_config(
    target: Path, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ValueError, OSError), match=r"config\.json|model_type"):
        engine_config(target, clover2(tmp_path))


def test_explicit_async_scheduling(target: Path, head: Path) -> None:
    with pytest.raises(ValueError, match="clover2 does not support asynchronous"):
        engine_config(target, clover2(head), async_scheduling=True)


def test_name_of_the_directory_does_not_matter(target: Path, tmp_path: Path) -> None:
    """Stock vLLM guesses a method from names like these."""
    head = save_random_head(tmp_path / "my-eagle3-dflash-mtp", TinyModel())
    assert engine_config(target, clover2(head)).speculative_config.method == "clover2"


def test_compile_cache_is_not_shared(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With EAGLE, with n-grams, or with layers that have another product."""
    hashes = set()
    for options in (clover2(head), {"method": "clover2", "model": "none"}):
        speculative = engine_config(target, options).speculative_config
        hashes.add(SpeculativeConfig.compute_hash(speculative))
        for packed in (True, False):
            monkeypatch.setattr(
                speculative_config, "serves_packed", lambda served=packed: served
            )
            hashes.add(speculative.compute_hash())
    assert len(hashes) == 5  # "none" without our product is as n-grams


def test_config_survives_pickling_into_a_process_without_plugins(
    target: Path, head: Path, tmp_path: Path
) -> None:
    """As from the API server to the engine core; the worker must not be imported."""
    config = engine_config(target, clover2(head, tree="static"))
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    program = (
        "import pickle, pathlib, sys\n"
        f"c = pickle.loads(pathlib.Path({str(tmp_path / 'config.pickle')!r})"
        ".read_bytes())\n"
        "s = c.speculative_config\n"
        "print(type(s).__name__, s.method, s.tree, s.num_speculative_tokens)\n"
        "print([m for m in sys.modules if 'worker' in m and 'clover2' in m\n"
        "       or m.endswith('cpu_worker')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.strip().splitlines()[-2:]
    assert lines == ["Clover2SpeculativeConfig clover2 static 25", "[]"]
