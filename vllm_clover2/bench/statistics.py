# SPDX-License-Identifier: Apache-2.0
"""Whether two samples can be of one distribution."""

from collections.abc import Hashable, Sequence
from math import comb

import numpy as np
import torch

__all__ = ["chi_square", "more_often", "same_distribution"]

_LEAST = 5.0  # expected in every cell, below which chi-square's law does not hold


def chi_square(
    observed: np.ndarray,  # counts, any shape
    expected: np.ndarray,  # like observed, with the same sum
) -> float:
    """Probability of counts that are at least so far from those expected.

    Cells that expect fewer than five are judged together.

    Raises:
        ValueError: fewer than two cells are left.
    """
    rows = np.stack([observed.ravel(), expected.ravel()]).astype(float)
    seen, wanted = _pooled(rows, rows[1])
    if len(wanted) < 2:
        raise ValueError(
            f"chi-square needs two cells that expect {_LEAST:g} or more, found "
            f"{len(wanted)}; draw more samples"
        )
    return _upper_tail(float(((seen - wanted) ** 2 / wanted).sum()), len(wanted) - 1)


def same_distribution(
    left: Sequence[Hashable], right: Sequence[Hashable]
) -> float | None:
    """Probability that two samples of one distribution differ at least so much.

    Outcomes that are rare in both samples are judged together. None where a single
    outcome is left: nothing can differ.
    """
    outcomes = sorted({*left, *right}, key=repr)
    places = {outcome: place for place, outcome in enumerate(outcomes)}
    counts = np.stack(
        [
            np.bincount([places[one] for one in sample], minlength=len(outcomes))
            for sample in (left, right)
        ]
    )
    shares = counts.sum(axis=0) / counts.sum()
    counts = _pooled(counts, shares * min(len(left), len(right)))
    if counts.shape[1] < 2:
        return None
    expected = counts.sum(axis=1, keepdims=True) * counts.sum(axis=0) / counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return _upper_tail(statistic, counts.shape[1] - 1)


def _pooled(
    rows: np.ndarray,  # [N, cells]
    expected: np.ndarray,  # [cells]
) -> np.ndarray:  # [N, fewer cells]
    """Cells that expect too little made one, and with another one if need be."""
    rare = expected < _LEAST
    pooled = np.column_stack([rows[:, ~rare], rows[:, rare].sum(axis=1)])
    if expected[rare].sum() < _LEAST:
        pooled = np.column_stack([pooled[:, :-2], pooled[:, -2:].sum(axis=1)])
    return pooled


def more_often(events: int, trials: int, other_events: int, other_trials: int) -> float:
    """Probability, were both rates one, of so many of all events among `trials`.

    Fisher's exact test, one-sided: small where `events` of `trials` are too many.
    """
    all_events, everything = events + other_events, trials + other_trials
    at_least = sum(
        comb(trials, k) * comb(other_trials, all_events - k)
        for k in range(events, min(trials, all_events) + 1)
    )
    return at_least / comb(everything, all_events)


def _upper_tail(statistic: float, degrees: int) -> float:
    half_degrees, half = torch.tensor([degrees, statistic]).double() / 2
    return float(torch.special.gammaincc(half_degrees, half))
