"""The bootstrap against exact enumeration, closed forms, scipy and the naive loop."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_assets.stats import bootstrap
from persona_assets.stats.bootstrap import bootstrap_mean

B = 40_000


def exact_sums(values: list[int]) -> dict[int, float]:
    """Exact distribution of the resampled sum, by enumerating all n^n resamples."""
    counts = Counter(sum(draw) for draw in itertools.product(values, repeat=len(values)))
    return {total: count / len(values) ** len(values) for total, count in counts.items()}


def boot(values, number_id="number", n_resamples=B, **kwargs):
    return bootstrap_mean(values, seed=186, number_id=number_id, n_resamples=n_resamples, **kwargs)


@pytest.mark.parametrize("values", [[1, 0, -1], [1, 1, 0, 0, -1], [2, 0, -1, 5], [1, 1, 1, 1, 0]])
def test_resampled_sums_have_the_enumerated_distribution(values):
    exact = exact_sums(values)
    drawn = Counter(boot(values).sums.tolist())
    assert set(drawn) <= set(exact)
    for total, probability in exact.items():
        five_sigma = 5 * math.sqrt(probability * (1 - probability) / B)
        assert drawn[total] / B == pytest.approx(probability, abs=five_sigma)


@pytest.mark.parametrize("values", [[1, 1, 0, -1], [1, 1, 1, 0, 0], [1, -1, 0, 0, 0]])
def test_p_value_is_the_enumerated_tail(values):
    total = sum(values)
    exact = sum(p for s, p in exact_sums(values).items() if abs(s - total) >= abs(total))
    result = boot(values)
    assert result.p_value == pytest.approx(exact, abs=5 * math.sqrt(0.25 / B))


def test_ties_are_ties():
    """Seven bystander means of +0.1 and three of −0.1: P(|K − 7| ≥ 2), K binomial(10, 0.7).

    In floats, sums that tie with the observed one miss it by rounding, and p came out at 0.176.
    """
    k = np.arange(11)
    exact = scipy.stats.binom.pmf(k, 10, 0.7)[np.abs(k - 7) >= 2].sum()
    assert exact == pytest.approx(0.2996, abs=5e-5)
    result = boot([1] * 7 + [-1] * 3, unit=10, n_resamples=200_000)
    assert result.estimate == 0.04
    assert result.p_value == pytest.approx(exact, abs=5 * math.sqrt(0.21 / 200_000))


def test_standard_error_is_the_plug_in_one():
    values = np.random.default_rng(3).integers(-10, 11, size=500)
    closed_form = values.std() / math.sqrt(len(values)) / 10
    assert boot(values, unit=10).std_error == pytest.approx(closed_form, rel=0.02)


def test_standard_error_divides_by_one_less_than_the_resamples():
    result = bootstrap.BootstrapMean(total=1, n=5, unit=2, sums=np.array([0, 2]))
    assert result.std_error == pytest.approx(math.sqrt(2) / 10)


def test_agrees_with_scipy():
    values = np.random.default_rng(4).integers(-1, 2, size=300)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=B, method="percentile", random_state=1, batch=1000
    )
    ours = boot(values)
    step = 1 / len(values)
    assert ours.interval(0.95) == pytest.approx(tuple(theirs.confidence_interval), abs=1.5 * step)
    assert ours.std_error == pytest.approx(theirs.standard_error, rel=0.02)


def test_quantiles_are_linear_between_order_statistics():
    result = boot([3, 1, 0, 0, -2], n_resamples=11, unit=2)
    assert result.quantile(0.25) == (result.sums[2] + result.sums[3]) / 2 / 10
    low, high = result.interval(0.8)
    assert (low, high) == pytest.approx((result.sums[1] / 10, result.sums[9] / 10))


def test_estimate_is_one_division_of_the_exact_sum():
    result = boot([[1, 2], [3, 5]], unit=10, n_resamples=10)
    assert (result.total, result.n, result.estimate) == (11, 4, 11 / 40)


def test_p_is_never_zero_and_one_without_an_effect():
    assert boot([1] * 50, n_resamples=999).p_value == 1 / 1000
    assert boot([0] * 50, n_resamples=999).p_value == 1.0


def test_stream_depends_on_seed_and_number_id_only(monkeypatch):
    values = np.arange(-30, 30)
    first = boot(values, "a").sums
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 700)
    assert np.array_equal(boot(values, "a").sums, first)
    assert not np.array_equal(boot(values, "b").sums, first)
    other = bootstrap_mean(values, seed=187, number_id="a", n_resamples=B).sums
    assert not np.array_equal(other, first)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-10, 10), min_size=1, max_size=30), st.randoms())
def test_row_order_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    one, other = boot(values, n_resamples=200), boot(shuffled, n_resamples=200)
    assert np.array_equal(one.sums, other.sums)
    assert (one.p_value, one.interval(0.9)) == (other.p_value, other.interval(0.9))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
def test_sign_flip_mirrors_the_result(values):
    one, other = boot(values, n_resamples=20_000), boot([-v for v in values], n_resamples=20_000)
    assert one.estimate == -other.estimate
    assert one.p_value == pytest.approx(other.p_value, abs=0.03)
    assert one.std_error == pytest.approx(other.std_error, rel=0.05, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-10, 10), min_size=1, max_size=20), st.floats(0.5, 0.99))
def test_intervals_are_nested_and_within_the_values(values, confidence):
    result = boot(values, n_resamples=300)
    low, high = result.interval(confidence)
    wide_low, wide_high = result.interval((1 + confidence) / 2)
    assert min(values) <= wide_low <= low <= high <= wide_high <= max(values)


@pytest.mark.parametrize(
    ("values", "kwargs", "error", "says"),
    [
        ([0.1, 0.2], {}, TypeError, "integers"),
        ([True], {}, TypeError, "integers"),
        ([], {}, ValueError, "no values"),
        ([1], {"unit": 0}, ValueError, "unit"),
        ([1], {"n_resamples": 1}, ValueError, "n_resamples"),
    ],
)
def test_refuses(values, kwargs, error, says):
    with pytest.raises(error, match=says):
        boot(values, **kwargs)
