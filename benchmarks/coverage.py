"""How often the intervals of both schemes cover a planted effect, at the real study's size.

    python -m benchmarks.coverage [--replications N] [--resamples B]

Synthetic studies of 4 sources × 3 seeds × 1172 questions on both axes; the effect of a question is
shared by its sources and seeds, from not at all to strongly. ``pairs`` (the scheme that was
published) covers as rarely as its standard error is too small; ``question`` covers nominally.
"""

from __future__ import annotations

import argparse
import itertools

from persona_assets import environment
from persona_assets.study import Study, load_study
from persona_assets_tests.stats.planted import Planted, binomial_tolerance, simulate

SHAPE = (4, 3, 1172)
SPREADS = (0.0, 0.05, 0.1, 0.2)


def study(resamples: int) -> Study:
    """The real study with another number of resamples."""
    real = load_study(environment.study_file("length_matched"))
    inference = real.inference.model_copy(update={"resamples": resamples})
    return real.model_copy(update={"inference": inference})


def main() -> None:
    """Print one line a design and scheme."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replications", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=2000)
    arguments = parser.parse_args()
    inference = study(arguments.resamples)
    nominal = inference.inference.confidence
    tolerance = binomial_tolerance(nominal, arguments.replications, sigmas=2)
    print(
        f"{arguments.replications} replications, B = {arguments.resamples}, nominal {nominal:.3f} "
        f"± {tolerance:.3f} (2 binomial standard errors)"
    )
    for n_personas, spread in itertools.product((1, 10), SPREADS):
        planted = Planted(SHAPE, n_personas, spread=spread)
        expected = {"pairs": planted.coverage_of_pairs(nominal), "question": nominal}
        for scheme, found in simulate(inference, planted, arguments.replications).items():
            print(
                f"personas {n_personas:2}  spread {spread:.2f}  se ratio {planted.se_ratio:.2f}  "
                f"{scheme:8}  covered {found.covered:.3f} (expected {expected[scheme]:.3f})  "
                f"planted {planted.effect:.3f}  mean estimate {found.mean:.5f}  "
                f"std error {found.std_error:.5f} of {found.sd:.5f}"
            )


if __name__ == "__main__":
    main()
