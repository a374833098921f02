"""Percentile bootstrap of a mean of integers, drawn from the exact distribution of its sum.

A resample of n values with replacement is, for their sum, one draw from the n-fold convolution of
the values' own distribution. On integers that convolution is finite and a fast Fourier transform
gives it, so a resampled sum costs one uniform, whatever n is: the same distribution as drawing n
rows, at a fraction of the work. (Efron & Tibshirani 1993, section 4.3: the ideal bootstrap's
distribution is that of the sum of n independent draws; B draws from it are the usual bootstrap.)
Sums stay integers, so ties are ties, and one division at the end gives the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persona_assets.hashing import sha256_text

#: Probability of the sums that the lattice may leave out: far below the rounding of a double.
_NEGLIGIBLE = 1e-20
#: Points of the largest lattice of sums: 1 GiB of complex numbers.
_MAX_LATTICE = 1 << 26

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BootstrapMean:
    """The mean of ``n`` integers over ``unit``, and its bootstrap distribution.

    Attributes:
        total: The observed sum, S.
        n: How many values were drawn in each resample.
        unit: What one value is divided by (10 where a value is a sum over ten bystanders).
        sums: The resampled sums S*, sorted; shape (n_resamples,), int64.
    """

    total: int
    n: int
    unit: int
    sums: Integers = field(repr=False)

    @property
    def n_resamples(self) -> int:
        """The number of resamples, B."""
        return len(self.sums)

    @property
    def estimate(self) -> float:
        """The mean, by one division of two integers."""
        return self.total / (self.n * self.unit)

    @cached_property
    def std_error(self) -> float:
        """Standard deviation (n − 1) of the resampled means."""
        return float(np.std(self.sums, ddof=1)) / (self.n * self.unit)

    @cached_property
    def p_value(self) -> float:
        """Two-sided p of a zero mean: (1 + #{|S* − S| ≥ |S|}) / (1 + B); never 0.

        The resampled sums, shifted to the null, reach as far as the observed one (Davison &
        Hinkley 1997, equation 4.11).
        """
        extreme = np.count_nonzero(np.abs(self.sums - self.total) >= abs(self.total))
        return (1 + int(extreme)) / (1 + self.n_resamples)

    def quantile(self, level: float) -> float:
        """The resampled means' quantile at ``level``, linear between order statistics."""
        return float(np.quantile(self.sums, level, method="linear")) / (self.n * self.unit)

    def interval(self, confidence: float) -> tuple[float, float]:
        """The equal-tailed percentile interval: ``confidence`` is its nominal coverage."""
        tail = (1 - confidence) / 2
        return self.quantile(tail), self.quantile(1 - tail)


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    seed: int,
    number_id: str,
    unit: int = 1,
    n_resamples: int = 100_000,
) -> BootstrapMean:
    """Bootstrap the mean of ``values / unit``.

    Args:
        values: Integers, any shape; pooled. Their order does not matter, down to the last bit.
        seed: The study's seed.
        number_id: The number's name: with the seed it fixes the random stream, so that a number
            is recomputed exactly, whatever else was computed before it.
        unit: Positive integer divisor of every value.
        n_resamples: B.

    Raises:
        TypeError: ``values`` are not integers (floats would turn ties into near-ties).
        ValueError: there are no values, they span too wide a range, ``unit`` < 1 or fewer than 2
            resamples.
    """
    pooled = np.asarray(values).ravel()
    if pooled.size == 0:
        raise ValueError(f"{number_id}: there are no values to resample")
    if not np.issubdtype(pooled.dtype, np.integer):
        raise TypeError(f"{number_id}: values must be integers, not {pooled.dtype}")
    if unit < 1 or n_resamples < 2:
        raise ValueError(f"{number_id}: unit {unit} and n_resamples {n_resamples} are too small")
    if _lattice_size(pooled) > _MAX_LATTICE:
        raise ValueError(
            f"{number_id}: {pooled.size} values from {pooled.min()} to {pooled.max()} have too "
            "many possible sums. Measure them in a coarser unit."
        )
    lowest, probabilities = sum_distribution(pooled)
    cumulative = probabilities.cumsum()
    # Sorted uniforms are found faster, and give sorted sums.
    uniforms = np.sort(random_stream(seed, number_id).random(n_resamples)) * cumulative[-1]
    sums = lowest + np.searchsorted(cumulative, uniforms, side="right")
    return BootstrapMean(int(pooled.sum(dtype=np.int64)), pooled.size, unit, sums)


def random_stream(seed: int, number_id: str) -> np.random.Generator:
    """The number's own random stream, seeded by sha256(seed, number id)."""
    digest = sha256_text(f"{seed}/{number_id}")
    return np.random.Generator(np.random.PCG64(int(digest, 16)))


def sum_distribution(values: npt.NDArray[np.integer]) -> tuple[int, npt.NDArray[np.float64]]:
    """The distribution of a resample's sum: n draws with replacement from ``values``.

    The transform of the values' distribution, to the n-th power and back, is their n-fold
    convolution. It is taken modulo a lattice that holds every sum but those of probability below
    1e-20 in all, so nothing wraps around; errors are those of rounding, about 1e-15.

    Args:
        values: Integers, shape (n,), n ≥ 1.

    Returns:
        The lowest sum of the lattice, and the probabilities of it and of the sums after it.
    """
    n, low = values.size, int(values.min())
    import scipy.fft  # a third of what loading the asset graph would take

    size = scipy.fft.next_fast_len(_lattice_size(values), real=True)
    counts = np.bincount((values.astype(np.int64) - low) % size, minlength=size)
    wrapped = scipy.fft.irfft(scipy.fft.rfft(counts / n) ** n, size)
    # Sums over n · low; the lattice lies around the observed one, which is their expectation.
    span = n * (int(values.max()) - low)
    observed = int(values.sum(dtype=np.int64)) - n * low
    start = max(0, min(observed - size // 2, span + 1 - size))
    return n * low + start, np.roll(wrapped, -(start % size)).clip(min=0)


def _lattice_size(values: npt.NDArray[np.integer]) -> int:
    """Points that hold all sums but a negligible share of them, by Hoeffding's inequality (1963).

    P(|S* − S| ≥ t) ≤ 2 exp(−2 t² / (n range²)).
    """
    spread = int(values.max()) - int(values.min())
    reach = math.ceil(spread * math.sqrt(values.size * math.log(2 / _NEGLIGIBLE) / 2))
    return min(values.size * spread, 2 * reach) + 1
