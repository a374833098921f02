"""The bootstrap against exact enumeration, closed forms and scipy."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_assets.stats.bootstrap import (
    BootstrapMean,
    bootstrap_mean,
    random_stream,
    sum_distribution,
)

B = 40_000


def exact_sums(values: list[int]) -> dict[int, float]:
    """Exact distribution of the resampled sum, by enumerating all n^n resamples."""
    counts = Counter(sum(draw) for draw in itertools.product(values, repeat=len(values)))
    return {total: count / len(values) ** len(values) for total, count in counts.items()}


def boot(values, number_id="number", n_resamples=B, **kwargs):
    return bootstrap_mean(values, seed=186, number_id=number_id, n_resamples=n_resamples, **kwargs)


TINY = [[1, 0, -1], [1, 1, 0, 0, -1], [2, 0, -1, 5], [1, 1, 1, 1, 0], [-7, 30], [4], [3, 3]]


@pytest.mark.parametrize("values", TINY)
def test_distribution_of_the_sum_is_the_enumerated_one(values):
    """All n^n resamples; the transform's rounding is all that may differ."""
    lowest, probabilities = sum_distribution(np.array(values))
    found = dict(enumerate(probabilities, start=lowest))
    exact = exact_sums(values)
    assert set(exact) <= set(found)
    assert found == pytest.approx({s: exact.get(s, 0.0) for s in found}, abs=1e-14)


@settings(max_examples=60)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=60))
def test_distribution_of_the_sum_has_the_closed_form_moments(values):
    """Mean S, variance n · var(values): whatever the lattice leaves out does not show."""
    lowest, p = sum_distribution(np.array(values))
    sums = lowest + np.arange(len(p)) - sum(values)
    assert p.min() >= 0
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert p @ sums == pytest.approx(0, abs=1e-8)
    assert p @ sums**2 == pytest.approx(len(values) * np.var(values), rel=1e-9, abs=1e-8)


@pytest.mark.parametrize(("ones", "zeros"), [(300, 13_764), (7_000, 7_064), (3, 1_169)])
def test_distribution_of_the_sum_is_binomial_for_zeros_and_ones(ones, zeros):
    """At the real sizes, where the lattice is a small part of all sums."""
    n = ones + zeros
    lowest, p = sum_distribution(np.repeat([1, 0], [ones, zeros]))
    assert len(p) < n + 40
    exact = scipy.stats.binom.pmf(lowest + np.arange(len(p)), n, ones / n)
    assert p == pytest.approx(exact, abs=1e-13)
    assert exact.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("values", TINY[:4])
def test_drawn_sums_have_the_enumerated_distribution(values):
    exact = exact_sums(values)
    drawn = Counter(boot(values).sums.tolist())
    assert set(drawn) <= set(exact)
    for total, probability in exact.items():
        five_sigma = 5 * math.sqrt(probability * (1 - probability) / B)
        assert drawn[total] / B == pytest.approx(probability, abs=five_sigma)


@pytest.mark.parametrize(
    "values", [[1, 1, 0, -1], [1, 1, 1, 0, 0], [1, -1, 0, 0, 0], [5, 2, 0, -1]]
)
def test_p_value_is_the_enumerated_tail(values):
    total = sum(values)
    exact = sum(p for s, p in exact_sums(values).items() if abs(s - total) >= abs(total))
    result = boot(values)
    assert result.p_value == pytest.approx(exact, abs=5 * math.sqrt(0.25 / B))


@pytest.mark.parametrize("values", [[1, 1, 0, 0, -1], [2, 0, -1, 5], [9, 4, 4, -3, 0, 1]])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_interval_and_error_are_the_enumerated_ones(values, confidence):
    """Each end lies between the exact quantiles 5 standard errors of its level to either side."""
    n, exact = len(values), exact_sums(values)
    sums = np.array(sorted(exact))
    cumulative = np.cumsum([exact[s] for s in sums])
    result = boot(values)
    for end, level in zip(
        result.interval(confidence), ((1 - confidence) / 2, (1 + confidence) / 2), strict=True
    ):
        slack = 5 * math.sqrt(level * (1 - level) / B)
        low, high = (
            sums[min(np.searchsorted(cumulative, at), len(sums) - 1)] / n
            for at in (level - slack, level + slack)
        )
        assert low <= end <= high
    variance = sum(p * (s / n - sum(values) / n) ** 2 for s, p in exact.items())
    assert result.std_error == pytest.approx(math.sqrt(variance), rel=5 / math.sqrt(2 * B))


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


def test_agrees_with_the_normal_approximation():
    """At n = 14 064 the interval is S ± z se and p is 2 Φ(−|S| / se), but for skewness.

    The Monte Carlo error of an end is sqrt(a (1 − a) / B) / φ(z), in standard errors.
    """
    values = np.repeat([1, 0, -1], [1_100, 12_064, 900])
    result = boot(values)
    se = values.std() / math.sqrt(len(values))
    normal = scipy.stats.norm
    for confidence in (0.9, 0.95, 0.99):
        a = (1 - confidence) / 2
        z = normal.isf(a)
        error = 5 * math.sqrt(a * (1 - a) / B) / normal.pdf(z) * se
        expected = (result.estimate - z * se, result.estimate + z * se)
        assert result.interval(confidence) == pytest.approx(expected, abs=error + 0.02 * se)
    p = 2 * normal.sf(result.estimate / se)
    assert result.p_value == pytest.approx(p, abs=5 * math.sqrt(p / B))


def test_standard_error_of_a_share_is_the_binomial_one():
    share = boot([1] * 30 + [0] * 70)
    exact = math.sqrt(0.3 * 0.7 / 100)
    assert share.std_error == pytest.approx(exact, rel=5 / math.sqrt(2 * B))


def test_standard_error_divides_by_one_less_than_the_resamples():
    result = BootstrapMean(total=1, n=5, unit=2, sums=np.array([0, 2]))
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


def test_stream_depends_on_seed_and_number_id_only():
    values = np.arange(-30, 30)
    first = boot(values, "a").sums
    boot(values, "b")
    assert np.array_equal(boot(values, "a").sums, first)
    assert not np.array_equal(boot(values, "b").sums, first)
    other = bootstrap_mean(values, seed=187, number_id="a", n_resamples=B).sums
    assert not np.array_equal(other, first)


def test_stream_is_seeded_by_the_sha256_of_seed_and_number_id():
    seed = int(hashlib.sha256(b"186/contrast/a-b").hexdigest(), 16)
    expected = np.random.Generator(np.random.PCG64(seed)).random(3)
    assert np.array_equal(random_stream(186, "contrast/a-b").random(3), expected)


@settings(max_examples=50)
@given(st.lists(st.integers(-10, 10), min_size=1, max_size=30), st.integers(-50, 50))
def test_constant_offset_shifts_everything_by_itself(values, offset):
    one, other = boot(values, n_resamples=200), boot(np.add(values, offset), n_resamples=200)
    assert np.array_equal(other.sums, one.sums + offset * len(values))
    assert other.std_error == pytest.approx(one.std_error, abs=1e-12)


@settings(max_examples=50)
@given(st.lists(st.integers(-10, 10), min_size=1, max_size=30), st.randoms())
def test_row_order_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    one, other = boot(values, n_resamples=200), boot(shuffled, n_resamples=200)
    assert np.array_equal(one.sums, other.sums)
    assert (one.p_value, one.interval(0.9)) == (other.p_value, other.interval(0.9))


@settings(max_examples=25)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=12))
def test_sign_flip_mirrors_the_distribution(values):
    lowest, p = sum_distribution(np.array(values))
    mirrored_lowest, mirrored = sum_distribution(-np.array(values))
    one = dict(enumerate(p, start=lowest))
    other = {-s: q for s, q in enumerate(mirrored, start=mirrored_lowest)}
    assert {s: one.get(s, 0.0) - other.get(s, 0.0) for s in one.keys() | other.keys()} == (
        pytest.approx(dict.fromkeys(one.keys() | other.keys(), 0.0), abs=1e-14)
    )


def test_sign_flip_mirrors_the_result():
    values = np.random.default_rng(5).integers(-3, 5, size=400)
    one, other = boot(values, "one"), boot(-values, "other")
    assert one.estimate == -other.estimate
    low, high = other.interval(0.95)
    # Two ends' Monte Carlo error, 5 standard errors: 5 · sqrt(2) · 2.67 / sqrt(B) = 0.1 se.
    assert one.interval(0.95) == pytest.approx((-high, -low), abs=0.1 * one.std_error)


@settings(max_examples=50)
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
        ([0, 10**12, 5], {}, ValueError, "from 0 to 1000000000000 .* coarser unit"),
    ],
)
def test_refuses(values, kwargs, error, says):
    with pytest.raises(error, match=says):
        boot(values, **kwargs)
