# SPDX-License-Identifier: Apache-2.0
"""Weights of products as int8, in the layout of ``clover2::int8_product``.

A growing tree has few rows, so on a CPU its time is that of reading weights. Each
output's weights are rounded to 255 steps of a scale of its own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

# Outputs that are computed together; the summed dimension is padded to as many.
GROUP = 64
# Weights that are multiplied by one 32-bit word of an input's bytes.
WORD = 4
# Weights are stored unsigned, as -127..127 plus this.
ZERO = 128
# Rows of smaller inputs are rounded to 0: 127 / input would be infinite.
LEAST_INPUT = 1e-36


class Int8Weight(NamedTuple):
    """A weight [N, K] and bias [N]: ``scales * (packed - ZERO)`` after unpacking."""

    packed: torch.Tensor  # [ceil(N / 64), 64 ceil(K / 64) / 4, 64, 4] uint8
    scales: torch.Tensor  # [N] float32
    bias: torch.Tensor | None  # [N] float32


def pack_int8(
    weight: torch.Tensor,  # [N, K]
    bias: torch.Tensor | None = None,  # [N]
) -> Int8Weight:
    """Rounds every row of a weight to int8 and packs it, once after loading."""
    rows = weight.float()
    scales = rows.abs().amax(dim=1) / 127
    # A row of zeros stays one.
    steps = rows / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    values = (steps.round() + ZERO).to(torch.uint8)
    outputs, depth = values.shape
    values = F.pad(values, (0, -depth % GROUP, 0, -outputs % GROUP), value=ZERO)
    packed = values.view(-1, GROUP, values.shape[1] // WORD, WORD).transpose(1, 2)
    return Int8Weight(
        packed.contiguous(), scales, None if bias is None else bias.float()
    )


def unpack_int8(
    packed: torch.Tensor,  # [groups, words, 64, 4] uint8
    scales: torch.Tensor,  # [N] float32
    depth: int,  # K
) -> torch.Tensor:
    """The integers [N, K] float32 of a packed weight, without their scales."""
    values = packed.transpose(1, 2).flatten(2).flatten(0, 1)
    return values[: len(scales), :depth].float() - ZERO
