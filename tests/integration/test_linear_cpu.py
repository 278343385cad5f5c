# SPDX-License-Identifier: Apache-2.0
"""Whose product linear layers have, in engines with and without clover2."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers import utils

from vllm_clover2.integration import linear_cpu
from vllm_clover2.integration.compat import patches

pytestmark = pytest.mark.skipif(
    not linear_cpu.serves_packed(), reason="with AVX-512 vLLM's own products serve"
)


def products(engine: Any) -> set[str]:
    """Modules that define the products of a target's layers."""
    layers = engine.runner.get_model().modules()
    return {one.cpu_linear.__module__ for one in layers if hasattr(one, "cpu_linear")}


@pytest.mark.parametrize(
    ("dtype", "ours"), [("float32", True), ("bfloat16", False)], ids=str
)
def test_layers_of_a_target(
    dtype: str, ours: bool, engines: Any, target: Path, head: Path
) -> None:
    module = linear_cpu.__name__ if ours else utils.__name__
    assert products(engines.get(target, head, dtype=dtype)) == {module}
    # An engine that is loaded later, without us.
    assert products(engines.get(target, None, dtype=dtype)) == {utils.__name__}


@pytest.mark.parametrize("remove_weight", [True, False])
@pytest.mark.parametrize("shape", [(3, 40), (2, 3, 40), (40,)], ids=str)
def test_a_layer(shape: tuple[int, ...], remove_weight: bool) -> None:
    layer: Any = nn.Linear(40, 50)
    weight = layer.weight.detach().clone()
    with patches.packed_cpu_linears():
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight)
    x = torch.randn(shape)
    actual = layer.cpu_linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(actual, x @ weight.T + layer.bias)
    assert layer.weight.numel() == (0 if remove_weight else weight.numel())


def test_what_is_no_linear_layer_is_left_to_vllm() -> None:
    layer: Any = nn.Module()
    layer.weight = nn.Parameter(torch.randn(4, 1, 4))
    stock = utils.dispatch_cpu_unquantized_gemm
    with patches.packed_cpu_linears():
        utils.dispatch_cpu_unquantized_gemm(layer, True)
    assert not hasattr(layer, "cpu_linear")
    assert utils.dispatch_cpu_unquantized_gemm is stock
