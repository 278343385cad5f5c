# SPDX-License-Identifier: Apache-2.0
"""Linear layers in float32 over packed weights; the order of sums is vLLM's.

Bit by bit they are compared in test_stock_numerics.
"""

import pytest
import torch

from vllm_clover2.ops import pack_linear, packed_linear

# Rows in one group and in several, outputs that fill panels and not, sums in one part
# and in several, of which one is small.
SHAPES = [
    (0, 5, 7),
    (1, 1, 1),
    (5, 16, 64),
    (6, 40, 100),
    (7, 33, 1030),
    (20, 100, 2500),
    (150, 17, 576),
]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_products_are_those_of_torch(run_op, rows, outputs, depth, bias) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(outputs, depth, generator=generator)
    added = torch.randn(outputs, generator=generator) if bias else None
    actual = run_op(
        "packed_linear",
        input=x,
        packed=pack_linear(weight),
        bias=added,
        outputs=outputs,
    )
    expected = x.double() @ weight.double().T
    if added is not None:
        expected += added
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6 * depth)


def test_rows_that_lie_apart(run_op) -> None:
    rows, weight = torch.randn(4, 300), torch.randn(20, 100)
    packed = pack_linear(weight)
    apart = {"input": rows[:, 50:150], "packed": packed, "bias": None, "outputs": 20}
    together = apart | {"input": rows[:, 50:150].contiguous()}
    actual = run_op("packed_linear", **apart)
    assert torch.equal(actual, run_op("packed_linear", **together))


@pytest.mark.parametrize("isa", ["", "portable"])
def test_a_row_does_not_depend_on_the_others(isa, monkeypatch) -> None:
    """However many there are, hence whatever was drafted beside it."""
    monkeypatch.setenv("CLOVER2_CPU_ISA", isa)
    x, packed = torch.randn(150, 1100), pack_linear(torch.randn(50, 1100))
    every = packed_linear(x, packed, None, 50)
    for count in (1, 2, 5, 6, 7, 13, 64):
        assert torch.equal(packed_linear(x[:count], packed, None, 50), every[:count])


def test_nan_and_infinity_stay_in_their_rows(run_op) -> None:
    x = torch.randn(3, 40)
    x[0, 3], x[1, 0] = torch.nan, torch.inf
    out = run_op(
        "packed_linear",
        input=x,
        packed=pack_linear(torch.ones(20, 40)),
        bias=None,
        outputs=20,
    )
    assert out[0].isnan().all()
    assert out[1].isinf().all()
    assert out[2].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.ones(2, 7)}, "as pack_linear lays it out"),
        ({"input": torch.ones(2, 8).bfloat16()}, "must be float32"),
        ({"input": torch.ones(8)}, "2 dimensions"),
        ({"input": torch.ones(8, 2).T}, "rows of input must be contiguous"),
        ({"input": torch.ones(2, 0)}, "at least one column"),
        ({"outputs": 17}, "as pack_linear lays it out"),
        ({"bias": torch.ones(15)}, "bias must be a float32 vector of 16"),
        ({"bias": torch.ones(16).bfloat16()}, "bias must be a float32 vector"),
    ],
)
def test_bad_arguments_are_refused(change, message) -> None:
    arguments = {
        "input": torch.ones(2, 8),
        "packed": pack_linear(torch.ones(16, 8)),
        "bias": None,
        "outputs": 16,
    }
    with pytest.raises(RuntimeError, match=message):
        packed_linear(**(arguments | change))
