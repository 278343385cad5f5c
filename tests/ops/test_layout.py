# SPDX-License-Identifier: Apache-2.0
"""Storage formulas, element by element."""

import pytest
import torch

from vllm_clover2.ops import KVLayout
from vllm_clover2.ops.layout import read_tokens, write_tokens

BLOCKS, HEADS, BLOCK, DIM = 3, 2, 32, 48


def element(layout: KVLayout, slot: int, head: int, d: int) -> tuple[int, int]:
    """Offsets of a key's and a value's element in the flat contiguous cache."""
    block, o = divmod(slot, BLOCK)
    base = (block * HEADS + head) * 2 * BLOCK * DIM
    values = base + BLOCK * DIM
    if layout == KVLayout.VEC:
        return base + d * BLOCK + o, values + o * DIM + d
    if layout == KVLayout.AMX:
        return (
            base + (o // 16) * 16 * DIM + (d // 2) * 32 + (o % 16) * 2 + d % 2,
            values + (d // 16) * 16 * BLOCK + (o // 2) * 32 + (d % 16) * 2 + o % 2,
        )
    return base + o * 2 * DIM + d, base + o * 2 * DIM + DIM + d


@pytest.mark.parametrize("layout", list(KVLayout), ids=lambda layout: layout.name)
def test_tokens_lie_where_the_formulas_say(layout: KVLayout) -> None:
    cache = torch.arange(BLOCKS * HEADS * BLOCK * 2 * DIM).view(
        BLOCKS, HEADS, BLOCK, -1
    )
    slots = torch.tensor([0, 17, 31, 32, 95])
    keys, values = read_tokens(cache, layout, slots)
    for i, slot in enumerate(slots.tolist()):
        for head in range(HEADS):
            expected = [element(layout, slot, head, d) for d in range(DIM)]
            assert keys[i, head].tolist() == [key for key, _ in expected]
            assert values[i, head].tolist() == [value for _, value in expected]


@pytest.mark.parametrize("layout", list(KVLayout), ids=lambda layout: layout.name)
def test_writing_changes_the_written_tokens_only(layout: KVLayout) -> None:
    cache = torch.zeros(BLOCKS, HEADS, BLOCK, 2 * DIM)
    slots = torch.tensor([1, 40, 95])
    rows = torch.arange(1, 3 * HEADS * DIM + 1).float().view(3, HEADS, DIM)
    write_tokens(cache, layout, slots, rows, -rows)
    keys, values = read_tokens(cache, layout, slots)
    assert torch.equal(keys, rows)
    assert torch.equal(values, -rows)
    assert int((cache != 0).sum()) == 2 * rows.numel()


def test_refused() -> None:
    cache = torch.zeros(2, 2, 40, 32)
    slots = torch.tensor([0])
    with pytest.raises(ValueError, match="multiples of 16"):
        read_tokens(cache, KVLayout.AMX, slots)
    with pytest.raises(ValueError, match="must be contiguous"):
        read_tokens(cache.transpose(1, 2), KVLayout.VEC, slots)
    with pytest.raises(ValueError, match="must be \\[blocks"):
        read_tokens(cache[..., :31], KVLayout.STRIDED, slots)
