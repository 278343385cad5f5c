# SPDX-License-Identifier: Apache-2.0
"""Tests of distributions, against scipy's."""

import numpy as np
import pytest
from scipy import stats

from vllm_clover2.bench.statistics import chi_square, more_often, same_distribution


def test_chi_square_is_scipys_after_pooling():
    observed = np.array([[30, 25, 10], [1, 2, 6]])
    expected = np.array([[28.0, 22.0, 14.0], [3.0, 3.0, 4.0]])
    pooled = stats.chisquare([30, 25, 10, 9], [28, 22, 14, 10])
    assert chi_square(observed, expected) == pytest.approx(pooled.pvalue)
    # What expects too little even together goes with the cell before it.
    observed, expected = np.array([30, 26, 4]), np.array([28.0, 30.0, 2.0])
    pooled = stats.chisquare([30, 30], [28, 32])
    assert chi_square(observed, expected) == pytest.approx(pooled.pvalue)
    with pytest.raises(ValueError, match="draw more samples"):
        chi_square(np.array([2, 2]), np.array([2.0, 2.0]))


def test_two_samples_are_compared_as_scipy_does():
    left = ["a"] * 40 + ["b"] * 35 + ["c"] * 20 + ["d"] * 3 + ["e"] * 2
    right = ["a"] * 60 + ["b"] * 30 + ["c"] * 25 + ["f"] * 4 + ["e"] * 1
    table = [[40, 35, 20, 5], [60, 30, 25, 5]]
    table = [[a, b, c + d] for a, b, c, d in table]  # ten rare ones are too few
    expected = stats.chi2_contingency(table, correction=False)
    assert same_distribution(left, right) == pytest.approx(expected.pvalue)
    assert same_distribution(left, left) == pytest.approx(1.0)
    assert same_distribution(["a"] * 9, ["a"] * 9) is None


def test_false_alarms_come_as_often_as_they_should():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(200, 0.1))
    draw = lambda: rng.choice(200, 500, p=weights).tolist()  # noqa: E731
    values = [same_distribution(draw(), draw()) for _ in range(400)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09


def test_more_often_is_fishers_test():
    for table in ([5, 12, 1, 12], [0, 12, 4, 12], [12, 12, 0, 12], [3, 9, 2, 20]):
        events, trials, others, other_trials = table
        rows = [[events, trials - events], [others, other_trials - others]]
        expected = stats.fisher_exact(rows, alternative="greater").pvalue
        assert more_often(*table) == pytest.approx(expected)
