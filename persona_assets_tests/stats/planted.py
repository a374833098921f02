"""A planted effect of known size, in outcomes whose noise is shared within a question.

A question moves the effect by ±``spread``, the same in every source and seed, as a question that
one arm's rationales answer better moves it in all of its cells. The effect over questions is the
planted one exactly; given the question, right and wrong answers are independent draws.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats

from persona_assets.stats.bootstrap import Integers
from persona_assets.stats.estimands import MACRO, Estimand, Side
from persona_assets.stats.estimates import SCHEMES, Sample, estimate
from persona_assets.study import Study
from persona_assets.study_schema import Axis

#: Accuracy of arm b; that of arm a is lower by the effect.
ACCURACY = 0.75


@dataclass(frozen=True)
class Planted:
    """One design: how much data there is, and the effect in it.

    Attributes:
        shape: (sources, seeds, questions).
        n_personas: How many personas a value sums over: 1 for the source's own loss.
        effect: The planted mean of loss_a − loss_b.
        spread: Half the difference between the effects of the two kinds of question.
    """

    shape: tuple[int, int, int]
    n_personas: int = 1
    effect: float = 0.1
    spread: float = 0.2

    @property
    def _within(self) -> float:
        """Variance of one persona's difference, given the question; its mean over questions."""
        a = [ACCURACY - self.effect + sign * self.spread for sign in (-1, 1)]
        return ACCURACY * (1 - ACCURACY) + sum(p * (1 - p) for p in a) / 2

    @property
    def se_ratio(self) -> float:
        """The question scheme's standard error over that of ``pairs``, in closed form.

        A question's mean over m = sources × seeds has variance spread² + w / m, with w the
        variance of one value given the question; ``pairs`` counts spread² once a pair instead.
        """
        m = self.shape[0] * self.shape[1]
        w = self._within / self.n_personas
        return math.sqrt((self.spread**2 + w / m) / ((self.spread**2 + w) / m))

    def coverage_of_pairs(self, confidence: float) -> float:
        """How often a normal interval covers whose standard error is too small by that ratio."""
        z = scipy.stats.norm.isf((1 - confidence) / 2) / self.se_ratio
        return float(1 - 2 * scipy.stats.norm.sf(z))

    def draw(self, rng: np.random.Generator) -> Integers:
        """One study's loss_a − loss_b, of :attr:`shape`."""
        of_question = self.effect + self.spread * rng.choice([-1, 1], size=self.shape[-1])
        right_a, right_b = (
            rng.binomial(self.n_personas, p, size=self.shape)
            for p in (ACCURACY - of_question, ACCURACY)
        )
        return right_b - right_a


@dataclass(frozen=True)
class Coverage:
    """One scheme over many replications of a design.

    Attributes:
        covered: Share of the intervals that hold the planted effect.
        mean: Mean of the estimates.
        std_error: Mean of the bootstrap's standard errors.
        sd: Standard deviation of the estimates: what a standard error should be.
        replications: How many studies were drawn.
    """

    covered: float
    mean: float
    std_error: float
    sd: float
    replications: int


def simulate(study: Study, planted: Planted, replications: int) -> dict[str, Coverage]:
    """Draw ``replications`` studies and estimate each under both schemes, by scheme.

    ``study`` says how (seed, resamples, confidence); it must have as many seeds as the design.
    """
    axis: Axis = "source_loss" if planted.n_personas == 1 else "bystander_leakage"
    estimand = Estimand("exploratory", Side("a", "planted"), Side("b", "planted"), axis)
    rows: dict[str, list[dict]] = {scheme: [] for scheme in SCHEMES}
    for replication in range(replications):
        values = planted.draw(np.random.default_rng([study.seed, replication]))
        # A scope of its own gives each replication its own random stream.
        sample = Sample(estimand, f"{MACRO}_{replication}", values, planted.n_personas)
        for scheme in SCHEMES:
            rows[scheme].append(estimate(study, sample, scheme))
    return {scheme: _summary(planted, found) for scheme, found in rows.items()}


def _summary(planted: Planted, rows: list[dict]) -> Coverage:
    estimates = [row["estimate"] for row in rows]
    return Coverage(
        covered=float(np.mean([r["ci_low"] <= planted.effect <= r["ci_high"] for r in rows])),
        mean=float(np.mean(estimates)),
        std_error=float(np.mean([row["std_error"] for row in rows])),
        sd=float(np.std(estimates, ddof=1)),
        replications=len(rows),
    )


def binomial_tolerance(share: float, n: int, sigmas: float = 4) -> float:
    """How far an observed share of n may lie from the true one: ``sigmas`` standard errors."""
    return sigmas * math.sqrt(share * (1 - share) / n)
