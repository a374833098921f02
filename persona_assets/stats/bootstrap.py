"""Percentile bootstrap of a mean of integers, by resampling the counts of its distinct values.

A resample of n values with replacement is, for their sum, a multinomial draw over the distinct
values: the same distribution as drawing n rows, at a fraction of the work where few values are
distinct (losses are; Efron & Tibshirani 1993, section 4.3, write the bootstrap in this form).
Sums stay integers, so ties are ties, and one division at the end gives the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from persona_assets.hashing import sha256_text

#: Counts held at a time; the stream of draws does not depend on it.
_CHUNK_ELEMENTS = 1 << 20


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
    sums: npt.NDArray[np.int64] = field(repr=False)

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
        ValueError: there are no values, ``unit`` < 1 or fewer than 2 resamples.
    """
    pooled = np.asarray(values).ravel()
    if pooled.size == 0:
        raise ValueError(f"{number_id}: there are no values to resample")
    if not np.issubdtype(pooled.dtype, np.integer):
        raise TypeError(f"{number_id}: values must be integers, not {pooled.dtype}")
    if unit < 1 or n_resamples < 2:
        raise ValueError(f"{number_id}: unit {unit} and n_resamples {n_resamples} are too small")
    distinct, counts = np.unique(pooled.astype(np.int64), return_counts=True)
    rng = random_stream(seed, number_id)
    sums = np.concatenate(list(_resampled_sums(rng, distinct, counts, n_resamples)))
    sums.sort()
    return BootstrapMean(int(distinct @ counts), int(counts.sum()), unit, sums)


def random_stream(seed: int, number_id: str) -> np.random.Generator:
    """The number's own random stream, seeded by sha256(seed, number id)."""
    digest = sha256_text(f"{seed}/{number_id}")
    return np.random.Generator(np.random.PCG64(int(digest, 16)))


def _resampled_sums(
    rng: np.random.Generator,
    distinct: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    n_resamples: int,
) -> Iterator[npt.NDArray[np.int64]]:
    n = int(counts.sum())
    rows = max(1, _CHUNK_ELEMENTS // len(distinct))
    for start in range(0, n_resamples, rows):
        drawn = rng.multinomial(n, counts / n, size=min(rows, n_resamples - start))
        yield drawn @ distinct
