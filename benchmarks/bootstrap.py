"""The registered estimates' bootstrap against a plain resampling loop, side by side in one run.

    python -m benchmarks.bootstrap [--resamples B] [--rounds N]

Synthetic losses of the real study's shape: its eight contrasts, each the macro and 4 sources, under
both schemes (80 estimates from 4 sources × 3 seeds × 1172 questions). Both sides do the same: point
value, interval, standard error and p of every estimate, at equal B. Read the ratios; seconds depend
on the machine.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np

from persona_assets import environment
from persona_assets.stats.bootstrap import BootstrapMean, bootstrap_mean, random_stream
from persona_assets.stats.estimands import MACRO, registered
from persona_assets.stats.estimates import SCHEMES, Sample
from persona_assets.study import Study, load_study

N_QUESTIONS = 1172

Bootstrap = Callable[..., BootstrapMean]


def row_by_row(
    values: np.ndarray, *, seed: int, number_id: str, unit: int, n_resamples: int
) -> BootstrapMean:
    """The plain bootstrap: draw n rows, sum them, B times."""
    rng = random_stream(seed, number_id)
    sums = [
        int(values[rng.integers(0, values.size, values.size)].sum()) for _ in range(n_resamples)
    ]
    return BootstrapMean(int(values.sum()), values.size, unit, np.sort(np.array(sums)))


def study_samples(study: Study) -> Iterator[Sample]:
    """The samples of the eight contrasts, with made-up losses: 0.25 of the answers differ."""
    rng = random_stream(study.seed, "benchmark data")
    for contrast in study.contrast_list:
        estimand = registered(study, contrast)
        sources = estimand.sources(study)
        n_personas = 1 if estimand.axis == "source_loss" else len(study.personas) - 1
        shape = (len(sources), len(study.seeds), N_QUESTIONS)
        values = rng.choice([-1, 0, 1], p=[0.1, 0.75, 0.15], size=(n_personas, *shape)).sum(axis=0)
        yield Sample(estimand, MACRO, values, n_personas)
        for index, source in enumerate(sources):
            yield Sample(estimand, source, values[[index]], n_personas)


def measure(
    way: Bootstrap, study: Study, samples: list[Sample], n_resamples: int
) -> tuple[Counter[tuple[str, str]], dict[str, float]]:
    """Seconds by (axis, scheme), and the standard error of every number."""
    seconds: Counter[tuple[str, str]] = Counter()
    errors = {}
    for sample in samples:
        for scheme in SCHEMES:
            name = sample.number_id(scheme)
            start = time.perf_counter()
            values, unit = sample.resampled(scheme)
            result = way(
                values, seed=study.seed, number_id=name, unit=unit, n_resamples=n_resamples
            )
            result.interval(study.inference.confidence)
            errors[name] = result.std_error
            assert result.p_value > 0
            seconds[sample.estimand.axis, scheme] += time.perf_counter() - start
    return seconds, errors


def main() -> None:
    """Print one line an axis and scheme, and the whole set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    study = load_study(environment.study_file("length_matched"))
    samples = list(study_samples(study))
    rounds = [
        [measure(way, study, samples, arguments.resamples) for way in (row_by_row, bootstrap_mean)]
        for _ in range(arguments.rounds)
    ]
    print(
        f"{len(samples) * len(SCHEMES)} estimates, B = {arguments.resamples}, "
        f"median of {arguments.rounds} interleaved rounds"
    )
    cases = list(rounds[0][0][0])
    for label, chosen in [*((" ".join(case), [case]) for case in cases), ("whole set", cases)]:
        plain, ours = (
            median(sum(r[side][0][case] for case in chosen) for r in rounds) for side in (0, 1)
        )
        print(f"{label:28} rows {plain:8.2f} s  sums {ours:7.3f} s  ratio {plain / ours:7.1f}")
    theirs, own = rounds[0][0][1], rounds[0][1][1]
    worst = max(abs(own[name] / theirs[name] - 1) for name in own)
    print(f"standard errors differ by at most {worst:.1%}")


if __name__ == "__main__":
    main()
