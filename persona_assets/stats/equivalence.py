"""Equivalence by two one-sided tests, read off a bootstrap interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from persona_assets.stats.bootstrap import BootstrapMean


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Two one-sided tests at level ``alpha`` each: the interval of 1 − 2 alpha within ±margin.

    "Equivalent within the margin" and "differs from 0" are separate statements: both can hold.
    """

    margin: float
    alpha: float
    ci_low: float
    ci_high: float

    @property
    def equivalent(self) -> bool:
        """Interval inclusion, strict on both sides (Schuirmann 1987)."""
        return -self.margin < self.ci_low and self.ci_high < self.margin

    def as_row(self) -> dict[str, Any]:
        """The fields and the verdict."""
        return {**asdict(self), "equivalent": self.equivalent}


def equivalence_test(result: BootstrapMean, margin: float, alpha: float) -> Equivalence:
    """Test a bootstrapped mean for equivalence with 0 within ±``margin``.

    Raises:
        ValueError: ``margin`` is not positive or ``alpha`` not in (0, 0.5).
    """
    if margin <= 0 or not 0 < alpha < 0.5:
        raise ValueError(f"margin {margin} must be positive, and alpha {alpha} within (0, 0.5)")
    # By the level, as whoever makes the number again does: 1 - alpha is not (1 + level) / 2.
    low, high = result.interval(1 - 2 * alpha)
    return Equivalence(margin, alpha, low, high)
