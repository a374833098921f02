"""Resampling counts of distinct values against drawing rows, side by side in one run.

    python -m benchmarks.bootstrap [--resamples B] [--rounds N]

Synthetic losses of the real study's shape (4 sources × 3 seeds × 1172 questions, both axes) go
through both; the ratio of the medians is what to read, seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from persona_assets.stats.bootstrap import BootstrapMean, bootstrap_mean, random_stream

SHAPE = (4, 3, 1172)


def row_by_row(values: np.ndarray, *, n_resamples: int, **_: object) -> BootstrapMean:
    """The plain bootstrap: draw n rows, sum them, B times."""
    rng = random_stream(0, "plain loop")
    flat = values.ravel()
    sums = [int(flat[rng.integers(0, flat.size, flat.size)].sum()) for _ in range(n_resamples)]
    return BootstrapMean(int(flat.sum()), flat.size, 1, np.sort(np.array(sums)))


def seconds(run: Callable[[], BootstrapMean]) -> tuple[float, BootstrapMean]:
    """How long one run took, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def cases() -> dict[str, np.ndarray]:
    """Differences of losses as the two axes and schemes have them."""
    rng = random_stream(0, "benchmark data")
    source = rng.choice([-1, 0, 1], p=[0.1, 0.7, 0.2], size=SHAPE)
    bystander = rng.choice([-1, 0, 1], p=[0.1, 0.75, 0.15], size=(10, *SHAPE)).sum(axis=0)
    return {
        "source loss, pairs": source,
        "bystander leakage, pairs": bystander,
        "source loss, question": source.sum(axis=(0, 1)),
        "bystander leakage, question": bystander.sum(axis=(0, 1)),
    }


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(f"B = {arguments.resamples}, median of {arguments.rounds} interleaved rounds")
    for name, values in cases().items():
        ways = [
            partial(way, values, seed=0, number_id=name, n_resamples=arguments.resamples)
            for way in (row_by_row, bootstrap_mean)
        ]
        rounds = [[seconds(way) for way in ways] for _ in range(arguments.rounds)]
        plain, ours = (statistics.median(r[side][0] for r in rounds) for side in (0, 1))
        errors = [rounds[0][side][1].std_error for side in (0, 1)]
        print(
            f"{name:28} n {values.size:6} values {len(np.unique(values)):3} "
            f"rows {plain:.3f} s  counts {ours:.4f} s  ratio {plain / ours:6.1f}  "
            f"std errors {errors[0]:.5f} {errors[1]:.5f}"
        )


if __name__ == "__main__":
    main()
