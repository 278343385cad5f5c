# SPDX-License-Identifier: Apache-2.0
"""Optimisers, where they are not PyTorch's own."""

import pytest
import torch
from torch import nn

from vllm_clover2.train.config import TrainConfig
from vllm_clover2.train.optimizers import Float32Muon, make_optimizers


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """Muon's five Newton-Schulz steps on a wide matrix, in its own dtype."""
    matrix = matrix / matrix.norm()
    for _ in range(5):
        gram = matrix @ matrix.T
        matrix = 3.4445 * matrix + (-4.7750 * gram + 2.0315 * gram @ gram) @ matrix
    return matrix


@pytest.mark.parametrize(
    ("muon", "precise"), [(Float32Muon, True), (torch.optim.Muon, False)]
)
def test_muon_in_float32_is_precise(
    muon: type[torch.optim.Optimizer], precise: bool
) -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(8, 24))
    matrix.grad = torch.randn(8, 24)
    expected = -orthogonalised(matrix.grad.double())
    muon([matrix], lr=1.0, weight_decay=0.0).step()  # type: ignore[call-arg]
    error = float((matrix.detach() - expected).abs().max())
    assert error < 0.1
    assert (error < 1e-5) == precise
    assert matrix.dtype == matrix.grad.dtype == torch.float32


def test_a_run_in_float32_has_that_muon(tiny_config: TrainConfig) -> None:
    model = nn.Linear(4, 4)
    for precision, found in (("fp32", Float32Muon), ("bf16", torch.optim.Muon)):
        settings = {"muon_lr": 1e-3, "precision": precision}
        config = TrainConfig(**tiny_config.model_dump() | settings)
        assert type(make_optimizers(model, None, config)[1]) is found
