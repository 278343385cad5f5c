# SPDX-License-Identifier: Apache-2.0
"""Patches: applied once, refused on another vLLM, invisible when not used."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm import SamplingParams
from vllm.config import ModelConfig
from vllm.config.speculative import SpeculativeConfig
from vllm.engine import arg_utils
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

import vllm_clover2
from vllm_clover2.integration import compat, plugin
from vllm_clover2.integration.compat import surface

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}


def test_expected_signatures_are_those_of_the_installed_vllm() -> None:
    surface.check_signatures(surface.EXPECTED_CONFIG)
    surface.check_signatures(surface.EXPECTED_WORKER)


def test_signature_mismatch_names_every_problem() -> None:
    wrong = {
        "vllm.engine.arg_utils:EngineArgs.add_cli_args": "parser colour",
        "vllm.engine.arg_utils:EngineArgs.no_such_method": "self",
        "vllm.no_such_module:f": "",
    }
    with pytest.raises(RuntimeError) as error:
        surface.check_signatures(wrong)
    message = str(error.value)
    assert "add_cli_args takes (parser), expected (parser colour)" in message
    assert "no_such_method is missing" in message
    assert "vllm.no_such_module:f is missing" in message
    assert vllm.__version__ in message
    assert "vllm==0.32.0 or vllm==0.33.0" in message


def test_mismatch_is_raised_only_when_the_method_is_asked_for(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        surface.EXPECTED_CONFIG, "vllm.engine.arg_utils:EngineArgs.gone", "self"
    )
    EngineArgs(model=str(target)).create_engine_config()
    speculative = {"method": "clover2", "model": str(head)}
    with pytest.raises(RuntimeError, match="gone is missing"):
        EngineArgs(
            model=str(target), speculative_config=speculative
        ).create_engine_config()


@pytest.mark.parametrize(
    "params", [{"min_p": 0.2}, {"logit_bias": {5: 1.0}}], ids=["min_p", "logit_bias"]
)
def test_other_methods_keep_their_refusals(
    params: dict[str, Any], target: Path, head: Path
) -> None:
    for speculative in (NGRAM, {"method": "clover2", "model": str(head)}):
        config = EngineArgs(
            model=str(target), speculative_config=dict(speculative)
        ).create_engine_config()
        refused = pytest.raises(VLLMValidationError, match="min_p and logit_bias")
        with refused if speculative is NGRAM else contextlib.nullcontext():
            SamplingParams(**params).verify(
                config.model_config, config.speculative_config, None, None
            )


@pytest.mark.parametrize(
    "version", ["0.32.0", "0.32.1", "0.32", "0.32.0+cpu", "0.33.0"]
)
def test_supported_versions(version: str) -> None:
    assert compat.version_problem(version) is None


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.320.0", "1.0", "0.3.2"])
def test_version_problem_names_both_versions(version: str) -> None:
    problem = compat.version_problem(version)
    assert problem is not None
    assert "\n" not in problem  # one paragraph
    assert f"vLLM {version} is installed" in problem
    supported = (
        f"vllm-clover2 {vllm_clover2.__version__} supports vLLM 0.32.x or 0.33.x"
    )
    assert supported in problem


def test_another_vllm_refuses_only_the_method(
    target: Path, head: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    # Undone after the test: install() patches it once more.
    monkeypatch.setattr(
        EngineArgs, "create_engine_config", EngineArgs.create_engine_config
    )
    compat.install()
    EngineArgs(model=str(target)).create_engine_config()
    EngineArgs(model=str(target), speculative_config=NGRAM).create_engine_config()
    asking = (
        {"speculative_config": {"method": "clover2", "model": str(head)}},
        {"spec_method": "clover2", "spec_model": str(head)},
    )
    for arguments in asking:
        with pytest.raises(RuntimeError, match=r"0\.33\.x, but vLLM 0\.99\.0"):
            EngineArgs(model=str(target), **arguments).create_engine_config()


def test_register_twice_patches_once() -> None:
    plugin.register()
    patched = EngineArgs.create_engine_config
    plugin.register()
    assert EngineArgs.create_engine_config is patched


def test_other_methods_keep_stock_classes(target: Path) -> None:
    config = EngineArgs(
        model=str(target), speculative_config=NGRAM
    ).create_engine_config()
    assert type(config.speculative_config) is SpeculativeConfig
    assert arg_utils.SpeculativeConfig is SpeculativeConfig
    assert "clover2" not in config.parallel_config.worker_cls
    plain = EngineArgs(model=str(target)).create_engine_config()
    assert plain.speculative_config is None
    assert "clover2" not in plain.parallel_config.worker_cls


def test_stock_class_is_back_after_an_error(target: Path, head: Path) -> None:
    speculative = {"method": "clover2", "model": str(head), "depth": -1}
    with pytest.raises(ValueError, match="depth"):
        EngineArgs(
            model=str(target), speculative_config=speculative
        ).create_engine_config()
    assert arg_utils.SpeculativeConfig is SpeculativeConfig


def test_a_worker_of_the_users_own_is_kept(target: Path, head: Path) -> None:
    speculative = {"method": "clover2", "model": str(head)}
    config = EngineArgs(
        model=str(target), speculative_config=speculative, worker_cls="mine.Worker"
    ).create_engine_config()
    assert config.parallel_config.worker_cls == "mine.Worker"


def test_what_keeps_vllm_from_model_runner_v2(target: Path, head: Path) -> None:
    """It logs these as its own reasons, and takes V1."""
    speculative = {"method": "clover2", "model": str(head)}
    config = EngineArgs(
        model=str(target), speculative_config=speculative
    ).create_engine_config()
    assert not config.use_v2_model_runner
    assert not config.speculative_config.runs_on_v2
    features = config._get_v2_model_runner_unsupported_features()
    assert features == ["clover2 without CUDA"]


@pytest.mark.parametrize("experts", [False, True])
def test_data_parallel_ranks_take_the_model_runner_of_the_server(
    target: Path, head: Path, experts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an engine core without experts vLLM sets the data-parallel size to 1."""
    monkeypatch.setattr(ModelConfig, "is_moe", experts)
    config = EngineArgs(
        model=str(target),
        speculative_config={"method": "clover2", "model": str(head)},
        data_parallel_size=2,
    ).create_engine_config()
    at_the_server = config.speculative_config.missing_on_v2()
    assert any("data parallelism" in part for part in at_the_server) == experts
    if not experts:
        config.parallel_config.reconfigure_for_independent_dp_rank()
    assert config.speculative_config.missing_on_v2() == at_the_server
