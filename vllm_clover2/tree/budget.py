# SPDX-License-Identifier: Apache-2.0
"""How many drafted nodes a step should verify, over all requests together.

A verified node costs time whether it is accepted or not. With one request a target
pass is bound by reading weights and more rows are nearly free; with many requests
every row counts, and the right number of nodes falls, in the end to none. Nodes are
therefore taken in the order of their joint probability over the whole batch, as many
as maximise the expected tokens per second of the next step. Nodes that cannot be among
these are not even grown, which for many requests would take as long as verifying.
"""

from collections.abc import Sequence

import torch

from vllm_clover2.tree.types import GrownTrees


def step_seconds(
    rows: Sequence[int],  # measured numbers of rows, ascending
    seconds: Sequence[float],  # of a step over as many rows
    max_rows: int,
) -> torch.Tensor:
    """A step's time for 0..max_rows rows [max_rows + 1] float32, from a few measured.

    Linear between the points, with the last slope beyond them. Noise may make a larger
    step look faster than a smaller one; the result never falls.
    """
    if len(rows) < 2 or len(rows) != len(seconds) or list(rows) != sorted(set(rows)):
        raise ValueError(
            f"a cost curve needs at least two ascending row counts with a time each, "
            f"found rows {list(rows)} and {len(seconds)} times"
        )
    x = torch.tensor(rows, dtype=torch.float32)
    y = torch.tensor(seconds, dtype=torch.float32).cummax(0).values
    wanted = torch.arange(max_rows + 1, dtype=torch.float32)
    right = torch.searchsorted(x, wanted).clamp(1, len(rows) - 1)
    slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
    return y[right] + (wanted - x[right]) * slope


def sizes_worth_verifying(
    trees: GrownTrees,
    seconds: torch.Tensor,  # [rows + 1] float32, a step's time by its rows
) -> torch.Tensor:
    """Nodes to keep of each tree [B] int32: a prefix of its list.

    The step verifies one root per request and the n likeliest nodes of all trees; it
    yields a token per request and, expected, the nodes' joint probabilities. n is the
    one with the best yield per second. Equal probabilities are kept or cut together.
    """
    requests, width = trees.joint.shape
    valid = torch.arange(width, device=trees.joint.device) < trees.sizes[:, None]
    joint = trees.joint.exp().masked_fill(~valid, 0.0)
    candidates = joint.flatten().sort(descending=True).values
    candidates = candidates[: max(0, len(seconds) - 1 - requests)]
    expected = requests + torch.nn.functional.pad(candidates.cumsum(0), (1, 0))
    best = (expected / seconds[requests : requests + len(expected)]).argmax()
    if best == 0:
        return torch.zeros_like(trees.sizes)
    least = candidates[best - 1]
    return ((joint >= least) & valid).sum(1, dtype=torch.int32)


def least_worth_verifying(
    seconds: torch.Tensor,  # [rows + 1] float32, a step's time by its rows
    max_requests: int,
) -> list[float]:
    """Joint probability under which no node pays, for 0..max_requests requests.

    Known before a tree is grown, so that growing need not try such nodes. Without
    drafts a step over r roots yields r tokens in ``seconds[r]``; a node that yields
    less in the time that it adds can only slow the step down. Over 1: no node pays.
    """
    # Of the step from r to r + 1 rows; there is no room for a row after the last.
    slopes = torch.nn.functional.pad(seconds.diff(), (0, 1), value=torch.inf)
    # The least of all further steps, because rows may get cheaper.
    slopes = slopes.flip(0).cummin(0).values.flip(0)[: max_requests + 1]
    requests = torch.arange(len(slopes), device=seconds.device)
    return (requests / seconds[: len(slopes)] * slopes).nan_to_num(0.0).tolist()
