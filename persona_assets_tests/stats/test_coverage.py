"""A planted effect is recovered, and the intervals cover it as often as they say, or do not.

Outcomes have noise shared within a question, over sources and seeds. The ``question`` scheme covers
at its nominal rate; ``pairs``, which counts a question once a cell, covers as rarely as the closed
form of its too small standard error says. Tolerances are 4 standard errors of a share.
"""

from __future__ import annotations

import math

import pytest

from persona_assets_tests.stats.planted import Planted, binomial_tolerance, simulate
from persona_assets_tests.synthetic import small_study

REPLICATIONS = 800
STUDY = small_study(seeds=[42, 137, 256], inference={"scaffold": "persona_cot", "resamples": 1000})
DESIGNS = {
    "source": Planted(shape=(4, 3, 250)),
    "bystander": Planted(shape=(4, 3, 250), n_personas=10),
}


@pytest.fixture(scope="module", params=DESIGNS)
def simulated(request):
    planted = DESIGNS[request.param]
    return planted, simulate(STUDY, planted, REPLICATIONS)


def test_planted_effect_is_recovered(simulated):
    planted, schemes = simulated
    for found in schemes.values():
        four_errors = 4 * found.sd / math.sqrt(REPLICATIONS)
        assert found.mean == pytest.approx(planted.effect, abs=four_errors)
    assert schemes["pairs"].mean == pytest.approx(schemes["question"].mean, rel=1e-12)


def test_question_covers_at_its_nominal_rate(simulated):
    _, schemes = simulated
    found = schemes["question"]
    assert found.covered == pytest.approx(0.95, abs=binomial_tolerance(0.95, REPLICATIONS))
    # The standard deviation of 800 estimates is itself known to 1 / sqrt(2 · 800): 2.5 %.
    assert found.std_error == pytest.approx(found.sd, rel=0.1)


def test_pairs_undercover_as_much_as_their_standard_error_is_too_small(simulated):
    planted, schemes = simulated
    pairs, question = schemes["pairs"], schemes["question"]
    assert question.std_error / pairs.std_error == pytest.approx(planted.se_ratio, rel=0.02)
    expected = planted.coverage_of_pairs(0.95)
    assert expected < 0.85
    assert pairs.covered == pytest.approx(expected, abs=binomial_tolerance(expected, REPLICATIONS))


def test_without_clustering_both_schemes_cover():
    planted = Planted(shape=(2, 3, 250), spread=0.0)
    assert planted.se_ratio == pytest.approx(1)
    for found in simulate(STUDY, planted, REPLICATIONS).values():
        assert found.covered == pytest.approx(0.95, abs=binomial_tolerance(0.95, REPLICATIONS))
