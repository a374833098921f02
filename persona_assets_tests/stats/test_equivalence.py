"""Equivalence by interval inclusion: strict, two-sided, apart from "differs from 0"."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

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


@pytest.mark.parametrize(
    ("mean", "verdicts"),
    [
        (-0.017, (True, True)),
        (-0.024, (False, True)),
        (-0.035, (False, True)),
        (-0.045, (False,) * 2),
    ],
)
def test_both_margins_agree_with_the_closed_form(mean, verdicts):
    """Two z-tests: |mean| + z(1 − α) se < margin, at ±0.03 (α 0.05) and ±0.05 (α 0.005)."""
    n = 3516
    minus = round((0.04 - mean / 2) * n)
    plus = minus + round(mean * n)
    values = np.repeat([1, 0, -1], [plus, n - plus - minus, minus])
    se = values.std() / math.sqrt(n)
    result = bootstrap_mean(values, seed=1, number_id="tost", n_resamples=40_000)
    for (margin, alpha), verdict in zip(((0.03, 0.05), (0.05, 0.005)), verdicts, strict=True):
        test = equivalence_test(result, margin, alpha)
        z = scipy.stats.norm.isf(alpha)
        # Monte Carlo error of a 0.5 % quantile at this B: 5 standard errors are 0.12 se.
        expected = (values.mean() - z * se, values.mean() + z * se)
        assert (test.ci_low, test.ci_high) == pytest.approx(expected, abs=0.15 * se)
        assert test.equivalent is verdict
        assert verdict is bool(abs(values.mean()) + z * se < margin)


@pytest.mark.parametrize(("margin", "alpha"), [(0, 0.05), (-1, 0.05), (0.1, 0), (0.1, 0.5)])
def test_refuses_impossible_tests(margin, alpha):
    with pytest.raises(ValueError, match="margin"):
        equivalence_test(bootstrap_mean([1, 0], seed=1, number_id="n"), margin, alpha)


def test_the_interval_is_that_of_its_level_to_the_last_bit():
    """Over many streams of fine-grained sums: 1 - alpha and (1 + level) / 2 round differently."""
    values = np.random.default_rng(0).integers(-40, 40, 300)
    for stream in range(40):
        result = bootstrap_mean(values, unit=12, seed=stream, number_id="x", n_resamples=100_000)
        for alpha in (0.05, 0.005):
            test = equivalence_test(result, 0.05, alpha)
            assert (test.ci_low, test.ci_high) == result.interval(1 - 2 * alpha)
