# SPDX-License-Identifier: Apache-2.0
"""The likeliest tokens of rows of logits, against sorting them one by one."""

import math

import pytest
import torch

INFINITY = float("inf")
# float32 sums of some thousand terms.
TOLERANCE = 2e-6


def likeliest(logits: list[float], k: int) -> tuple[list[float], list[int]]:
    """The k largest log-probabilities of a row in double precision, and their places.

    What is not finite has probability 0.
    """
    row = [x if math.isfinite(x) else -INFINITY for x in logits]
    places = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    top = max(row)
    if top == -INFINITY:
        return [-INFINITY] * k, places
    log_sum = math.log(sum(math.exp(x - top) for x in row))
    return [row[i] - top - log_sum for i in places], places


def check(run_op, logits: torch.Tensor, k: int) -> None:
    values, indices = run_op("top_k_log_probs", logits=logits, k=k)
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int64
    expected = [likeliest(row, k) for row in logits.tolist()]
    assert indices.tolist() == [places for _, places in expected]
    wanted = torch.tensor([row for row, _ in expected]).view(len(logits), k)
    torch.testing.assert_close(values, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert (values <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("size", "k"), [(1, 1), (7, 3), (64, 64), (100, 8), (1000, 1), (5000, 8)]
)
def test_likeliest_tokens(run_op, size, k, dtype) -> None:
    """bf16 logits of this size are often equal: the order of ties matters."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(6, size, generator=generator) * 4
    check(run_op, logits.to(dtype), k)


def test_lower_index_comes_first(run_op) -> None:
    rows = [[1.0] * 70, [0.0, -0.0] * 35, [2.0] * 9 + [3.0] * 61]
    check(run_op, torch.tensor(rows), 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_never_likely(run_op, dtype) -> None:
    logits = torch.zeros(5, 80, dtype=dtype)
    logits[0, 3] = torch.nan
    logits[1, 70] = INFINITY
    logits[2] = -INFINITY
    logits[2, 40] = 5.0
    logits[3] = torch.nan
    logits[4] = INFINITY
    check(run_op, logits, 9)


def test_certain_token_has_probability_one(run_op) -> None:
    logits = torch.full((1, 200), -1e4)
    logits[0, 150] = 1e4
    values, indices = run_op("top_k_log_probs", logits=logits, k=2)
    assert indices.tolist() == [[150, 0]]
    assert values.tolist() == [[0.0, -2e4]]


def test_rows_of_a_larger_tensor(run_op) -> None:
    logits = torch.randn(4, 300)
    check(run_op, logits[::2, 20:120], 5)


def test_no_rows(run_op) -> None:
    values, indices = run_op("top_k_log_probs", logits=torch.zeros(0, 9), k=4)
    assert values.shape == indices.shape == (0, 4)
