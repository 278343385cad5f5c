# SPDX-License-Identifier: Apache-2.0
"""Products with int8 weights, and the recurrent step that is made of them."""

import pytest
import torch

from vllm_clover2.model.layers import RecurrentHead
from vllm_clover2.ops import Int8Weight, pack_int8
from vllm_clover2.ops.int8 import unpack_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 1, 1),
    (3, 65, 100),
    (4, 64, 64),
    (5, 130, 576),
    (17, 63, 7),
    (40, 96, 72),
]
# Two factors in steps of 1/254 of their largest number, evenly distributed errors.
ROUNDING = 0.02
# The same steps, but sums of floats in another order can put a number that lies
# between two of them on the other one.
SAME_STEPS = 1e-3


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference of all elements together, relative to theirs."""
    return float((actual - expected).norm() / expected.norm())


def whole_numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Rows that int8 holds exactly: whole numbers up to 127, which is among them."""
    rows = torch.randint(-20, 21, shape, generator=generator).float()
    rows[:, -1] = 127.0
    return rows


def product(run_op, x: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    return run_op(
        "int8_product",
        input=x,
        packed=weight.packed,
        scales=weight.scales,
        bias=weight.bias,
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_whole_numbers_are_multiplied_exactly(
    run_op, rows, outputs, depth, dtype, bias
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = whole_numbers(generator, rows, depth)
    weight = whole_numbers(generator, outputs, depth)
    added = torch.randint(-9, 9, (outputs,), generator=generator) if bias else None
    actual = product(run_op, x.to(dtype), pack_int8(weight, added))
    # Of whole numbers below 2^24.
    expected = x @ weight.T if added is None else x @ weight.T + added
    assert torch.equal(actual, expected.to(dtype))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rounding_errors_are_small_at_any_scale(run_op, size) -> None:
    """Every row of both factors has a scale of its own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, 576, generator=generator)
    weight = torch.randn(200, 576, generator=generator)
    expected = x @ weight.T
    of_row = size * 10.0 ** torch.arange(-4, 5)[:, None]
    of_output = 10.0 ** torch.linspace(-4, 4, 200)[:, None]
    actual = product(run_op, x * of_row, pack_int8(weight * of_output))
    actual = actual.double() / of_row.double() / of_output.double().T
    assert (actual - expected).abs().max() < 5 * ROUNDING * expected.std()


def test_rows_of_zeros(run_op) -> None:
    x, weight = torch.randn(3, 30), torch.randn(5, 30)
    x[1], weight[2] = 0.0, 0.0
    bias = torch.randn(5)
    actual = product(run_op, x, pack_int8(weight, bias))
    assert torch.equal(actual[1], bias)
    assert torch.equal(actual[:, 2], bias[2].expand(3))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_broken_row_becomes_nan_alone(run_op, broken) -> None:
    x = torch.randn(4, 100)
    x[2, 17] = broken
    actual = product(run_op, x, pack_int8(torch.randn(70, 100)))
    assert actual[2].isnan().all()
    assert actual[[0, 1, 3]].isfinite().all()


def test_tiny_rows_become_zeros(run_op) -> None:
    """127 / their largest element would be infinite."""
    x = torch.randn(3, 100)
    x[1] *= 1e-39
    bias = torch.randn(70)
    actual = product(run_op, x, pack_int8(torch.randn(70, 100), bias))
    assert torch.equal(actual[1], bias)


def test_more_rows_than_fit_in_the_cache(run_op) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = whole_numbers(generator, 600, 80), whole_numbers(generator, 70, 80)
    assert torch.equal(product(run_op, x, pack_int8(weight)), x @ weight.T)


def test_rows_of_a_larger_tensor(run_op) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = whole_numbers(generator, 8, 90), whole_numbers(generator, 70, 64)
    part = x[::2, 26:]
    assert torch.equal(product(run_op, part, pack_int8(weight)), part @ weight.T)


def test_unpacked_weight_is_the_rounded_one() -> None:
    weight = torch.randn(70, 100)
    packed = pack_int8(weight)
    steps = unpack_int8(packed.packed, packed.scales, 100)
    assert steps.abs().amax(dim=1).eq(127).all()
    worst = (steps * packed.scales[:, None] - weight).abs() / packed.scales[:, None]
    assert worst.max() <= 0.5 + 1e-5


def step_weights(head: RecurrentHead) -> dict:
    """Arguments of the op, put together here from the head's own layers."""
    block, size = head.rab2, head.norm.weight.numel()
    output = head.step.weight
    token = [block.k_proj.weight, block.v_proj.weight, output[:, size:]]
    token_bias = [block.k_proj.bias, block.v_proj.bias, torch.zeros(size)]
    return {
        "query": pack_int8(block.q_proj.weight, block.q_proj.bias),
        "of_embedding": pack_int8(torch.cat(token), torch.cat(token_bias)),
        "output": pack_int8(output[:, :size], head.step.bias),
        "input_norm": block.input_layernorm.weight,
        "output_norm": head.norm.weight,
        "num_heads": block.num_heads,
        "eps": block.eps,
    }


def random_head(size: int, num_heads: int) -> RecurrentHead:
    torch.manual_seed(size)
    head = RecurrentHead(size, num_heads, 1e-5).requires_grad_(False)
    for weight in head.parameters():
        weight += 0.1 * torch.randn_like(weight)
    return head


def run_step(run_op, state, embedding, arguments: dict) -> list[torch.Tensor]:
    lists = {
        name: list(value) if isinstance(value, Int8Weight) else value
        for name, value in arguments.items()
    }
    return run_op("recurrent_step", state=state, embedding=embedding, **lists)


@pytest.mark.parametrize("rows", [0, 1, 8, 33])
@pytest.mark.parametrize(("size", "num_heads"), [(64, 4), (36, 6), (576, 9)])
def test_step_is_that_of_the_head(run_op, size, num_heads, rows) -> None:
    head = random_head(size, num_heads)
    state = torch.randn(rows, size)
    embedding = 0.05 * torch.randn(rows, size)  # far smaller, as in trained heads
    actual = run_step(run_op, state, embedding, step_weights(head))
    for ours, exact in zip(actual, head.advance(state, embedding), strict=True):
        assert ours.shape == exact.shape
        assert rows == 0 or distance(ours, exact) < ROUNDING


@pytest.mark.parametrize("dtype", DTYPES)
def test_step_keeps_the_dtype(run_op, dtype) -> None:
    head = random_head(64, 4)
    state, embedding = torch.randn(5, 64).to(dtype), torch.randn(5, 64).to(dtype)
    exact = head.advance(state.float(), embedding.float())
    weights = step_weights(head.to(dtype))
    for ours, expected in zip(run_step(run_op, state, embedding, weights), exact):
        assert ours.dtype == dtype
        assert distance(ours.float(), expected) < 2 * ROUNDING


def test_all_instruction_sets_step_alike(run_op) -> None:
    weights = step_weights(random_head(128, 4))
    generator = torch.Generator().manual_seed(4)
    state = torch.randn(20, 128, generator=generator)
    embedding = torch.randn(20, 128, generator=generator)
    native = torch.ops.clover2.recurrent_step
    expected = run_step(lambda _, **a: native(**a), state, embedding, weights)
    for ours, theirs in zip(run_step(run_op, state, embedding, weights), expected):
        assert distance(ours, theirs) < SAME_STEPS


@pytest.mark.parametrize("broken", ["state", "embedding"])
def test_diverged_state_proposes_nothing(run_op, broken) -> None:
    """Its scores are -inf, and other rows are as without it."""
    weights = step_weights(random_head(64, 4))
    output = pack_int8(torch.randn(200, 64))
    inputs = {"state": torch.randn(6, 64), "embedding": torch.randn(6, 64)}

    def scores() -> list[torch.Tensor]:
        _, out = run_step(run_op, arguments=weights, **inputs)
        return run_op("top_k_log_probs", logits=product(run_op, out, output), k=8)

    well_values, well_indices = scores()
    inputs[broken][4, 9] = torch.nan
    values, indices = scores()
    others = torch.arange(6) != 4
    assert torch.equal(values[others], well_values[others])
    assert torch.equal(indices[others], well_indices[others])
    assert values[4].eq(-torch.inf).all()
    assert ((indices >= 0) & (indices < 200)).all()
