"""Equivalence by interval inclusion: strict, two-sided, apart from "differs from 0"."""

from __future__ import annotations

import numpy as np
import pytest

from persona_assets.stats.bootstrap import BootstrapMean, bootstrap_mean
from persona_assets.stats.equivalence import Equivalence, equivalence_test


@pytest.mark.parametrize(
    ("low", "high", "equivalent"),
    [
        (-0.02, 0.02, True),
        (-0.03, 0.02, False),
        (-0.02, 0.03, False),
        (-0.029, 0.029, True),
        (-0.1, 0.0, False),
        (0.01, 0.1, False),
        (0.01, 0.02, True),
    ],
)
def test_inclusion_is_strict_on_both_sides(low, high, equivalent):
    assert Equivalence(0.03, 0.05, low, high).equivalent is equivalent


def test_interval_is_that_of_one_minus_two_alpha():
    result = BootstrapMean(total=0, n=10, unit=1, sums=np.arange(-100, 101))
    test = equivalence_test(result, margin=9.1, alpha=0.05)
    assert (test.ci_low, test.ci_high) == (-9.0, 9.0)
    assert test.equivalent
    assert not equivalence_test(result, margin=9.0, alpha=0.05).equivalent
    assert not equivalence_test(result, margin=9.1, alpha=0.005).equivalent


def test_different_from_zero_and_equivalent_can_both_hold():
    values = np.repeat([0, 1], [9900, 100])
    result = bootstrap_mean(values, seed=1, number_id="both", n_resamples=5000)
    assert result.p_value < 0.001
    assert equivalence_test(result, 0.03, 0.05).equivalent


@pytest.mark.parametrize(("margin", "alpha"), [(0, 0.05), (-1, 0.05), (0.1, 0), (0.1, 0.5)])
def test_refuses_impossible_tests(margin, alpha):
    with pytest.raises(ValueError, match="margin"):
        equivalence_test(bootstrap_mean([1, 0], seed=1, number_id="n"), margin, alpha)
