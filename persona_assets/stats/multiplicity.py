"""Family-wise error over the registered contrasts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given (Holm 1979).

    The i-th smallest of m is multiplied by m − i + 1; adjusted values never fall below those of
    smaller p-values and never exceed 1. Rejecting where the result is ≤ α keeps the family-wise
    error at α under any dependence.

    Raises:
        ValueError: a p-value is not in (0, 1].
    """
    p = np.asarray(p_values, dtype=float)
    if not np.all((p > 0) & (p <= 1)):
        raise ValueError(f"p-values must lie in (0, 1]: {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()
