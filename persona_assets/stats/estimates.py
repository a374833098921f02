"""From right answers to estimates: one sample a number, one row a sample and scheme.

Everything that is estimated goes the same way. An :class:`Estimand` says what is compared; its
:class:`Sample` holds the integers that define the number; :func:`estimate` resamples them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.stats.bootstrap import BootstrapMean, bootstrap_mean
from persona_assets.stats.equivalence import equivalence_test
from persona_assets.stats.estimands import MACRO, Estimand, Side, exploratory
from persona_assets.stats.losses import Answers, Integers, Outcomes, axis_size
from persona_assets.study import Study

#: ``pairs`` draws (source, seed, question) triples; ``question`` draws questions, each with all
#: its sources and seeds, since the same questions recur in every cell. The headline is the latter.
SCHEMES = ("pairs", "question")
HEADLINE_SCHEME = "question"

_BY_SEED = {"seed": pl.Int64, "total": pl.Int64, "estimate": pl.Float64}
_TEST = {"margin": pl.Float64, "alpha": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64}

#: One row a number with an interval: estimand × scope × scheme. ``total`` is the sum of the
#: ``n_values`` integers that are resampled, and ``estimate`` = ``total`` / (``n_values`` ·
#: ``unit``); ``n_pairs`` counts (source, seed, question) triples whatever the scheme.
#: ``se_ratio`` is the standard error over that of ``pairs`` for the same scope, null where that is
#: 0. ``by_seed`` holds each seed's own estimate within the scope (``total`` over the scope's pairs
#: of that seed), and ``seed_sd`` their standard deviation (n − 1; null for a single seed).
#: ``evaluations`` are the cells that define the number, and ``baseline`` where it does not cancel.
ESTIMATES_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("number_id", "kind", "contrast", "axis", "hypothesis"), pl.String),
        **dict.fromkeys(("arm_a", "scaffold_a", "arm_b", "scaffold_b"), pl.String),
        **dict.fromkeys(("scope", "scheme"), pl.String),
        **dict.fromkeys(("estimate", "ci_low", "ci_high", "std_error"), pl.Float64),
        **dict.fromkeys(("se_ratio", "seed_sd", "p_value"), pl.Float64),
        **dict.fromkeys(("total", "n_values", "unit", "n_pairs", "n_resamples"), pl.Int64),
        "evaluations": pl.List(pl.String),
        "by_seed": pl.List(pl.Struct(_BY_SEED)),
        "equivalence": pl.List(pl.Struct({**_TEST, "equivalent": pl.Boolean})),
    }
)


@dataclass(frozen=True)
class Sample:
    """The integers that one estimate is the mean of.

    Attributes:
        estimand: What is compared.
        scope: ``macro``, or one source.
        values: loss_a − loss_b, shape (sources, seeds, questions); on the bystander axis an entry
            is the sum over the bystanders.
        divisor: How many personas an entry sums over.
    """

    estimand: Estimand
    scope: str
    values: Integers
    divisor: int

    def number_id(self, scheme: str) -> str:
        """The name of one estimate, which also seeds its random stream."""
        return f"{self.estimand.key}/{self.scope}/{scheme}"

    def resampled(self, scheme: str) -> tuple[Integers, int]:
        """The integers that a scheme draws from, and what one is divided by: their mean is ours.

        Pairs themselves, or questions: each the sum over its sources and seeds.

        Raises:
            ValueError: no such scheme.
        """
        if scheme not in SCHEMES:
            raise ValueError(f"there is no scheme {scheme!r}: use one of {', '.join(SCHEMES)}")
        if scheme == "pairs":
            return self.values.ravel(), self.divisor
        n_sources, n_seeds, _ = self.values.shape
        return self.values.sum(axis=(0, 1)), self.divisor * n_sources * n_seeds

    @property
    def seed_totals(self) -> Integers:
        """The sum of each seed's values."""
        return self.values.sum(axis=(0, 2))

    @property
    def _seed_unit(self) -> int:
        """What a seed's total is divided by."""
        n_sources, _, n_questions = self.values.shape
        return n_sources * n_questions * self.divisor

    @property
    def seed_estimates(self) -> list[float]:
        """Each seed's own estimate."""
        return (self.seed_totals / self._seed_unit).tolist()

    @property
    def seed_sd(self) -> float | None:
        """Standard deviation (n − 1) of the seeds' estimates; None of a single seed.

        From the seeds' totals T by integers, √((k ΣT² − (ΣT)²) / (k (k − 1))) over their unit, so
        that SQL which does the same finds it to the last bit, in whatever order it adds.
        """
        totals = self.seed_totals.tolist()
        k = len(totals)
        if k == 1:
            return None
        squares = k * sum(total**2 for total in totals) - sum(totals) ** 2
        return math.sqrt(squares / (k * (k - 1))) / self._seed_unit


def samples(study: Study, estimand: Estimand, answers: Answers) -> Iterator[Sample]:
    """The estimand's samples: the macro's, then each source's.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the rows of ``estimand.evaluations``.
    """
    answers.require(estimand.evaluations(study), f"the estimate {estimand.key}")
    sources = estimand.sources(study)
    by_source = [_differences(study, estimand, answers, source) for source in sources]
    divisor = axis_size(study, estimand.axis)
    yield Sample(estimand, MACRO, np.stack(by_source), divisor)
    for source, values in zip(sources, by_source, strict=True):
        yield Sample(estimand, source, values[np.newaxis], divisor)


def _differences(study: Study, estimand: Estimand, answers: Answers, source: str) -> Integers:
    """loss_a − loss_b for one source, shape (seeds, questions)."""

    def right(cell: str, side: Side) -> Integers:
        row = answers.scaffolds.index(side.scaffold)
        return answers.right(cell, source, estimand.axis)[row]

    def loss(side: Side) -> Integers:
        """Of each seed; the baseline's answers are left out where they cancel."""
        lost = [-right(f"{source}.{side.arm}.{seed}", side) for seed in study.seeds]
        return np.stack(lost) + (right(BASELINE, side) if estimand.needs_baseline else 0)

    return loss(estimand.a) - loss(estimand.b)


def bootstrap(study: Study, sample: Sample, scheme: str) -> BootstrapMean:
    """The sample's bootstrap under a scheme, from the number's own random stream."""
    values, unit = sample.resampled(scheme)
    return bootstrap_mean(
        values,
        unit=unit,
        seed=study.seed,
        number_id=sample.number_id(scheme),
        n_resamples=study.inference.resamples,
    )


def estimate(study: Study, sample: Sample, scheme: str) -> dict[str, Any]:
    """One row of ``ESTIMATES_SCHEMA``, but for ``se_ratio``, which takes both schemes."""
    estimand, result = sample.estimand, bootstrap(study, sample, scheme)
    low, high = result.interval(study.inference.confidence)
    tests = [
        equivalence_test(result, test.margin, test.alpha)
        for test in (estimand.equivalence if sample.scope == MACRO else ())
    ]
    return {
        "number_id": sample.number_id(scheme),
        "kind": estimand.kind,
        "contrast": estimand.name,
        "axis": estimand.axis,
        "hypothesis": estimand.hypothesis,
        "arm_a": estimand.a.arm,
        "scaffold_a": estimand.a.scaffold,
        "arm_b": estimand.b.arm,
        "scaffold_b": estimand.b.scaffold,
        "scope": sample.scope,
        "scheme": scheme,
        "estimate": result.estimate,
        "ci_low": low,
        "ci_high": high,
        "std_error": result.std_error,
        "seed_sd": sample.seed_sd,
        "p_value": result.p_value,
        "total": result.total,
        "n_values": result.n,
        "unit": result.unit,
        "n_pairs": sample.values.size,
        "n_resamples": result.n_resamples,
        "evaluations": list(estimand.evaluations(study, sample.scope)),
        "by_seed": [
            {"seed": seed, "total": total, "estimate": value}
            for seed, total, value in zip(
                study.seeds, sample.seed_totals.tolist(), sample.seed_estimates, strict=True
            )
        ],
        "equivalence": [test.as_row() for test in tests],
    }


def estimates_table(study: Study, estimands: Iterable[Estimand], answers: Answers) -> pl.DataFrame:
    """Macro and per-source estimates under both schemes: ``ESTIMATES_SCHEMA``, in order.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the rows of some estimand's evaluations.
    """
    rows = [
        row
        for estimand in estimands
        for sample in samples(study, estimand, answers)
        for row in _both_schemes(study, sample)
    ]
    return pl.DataFrame(rows, schema=ESTIMATES_SCHEMA, orient="row")


def _both_schemes(study: Study, sample: Sample) -> list[dict[str, Any]]:
    rows = [estimate(study, sample, scheme) for scheme in SCHEMES]
    pairs = rows[SCHEMES.index("pairs")]["std_error"]
    return [row | {"se_ratio": row["std_error"] / pairs if pairs else None} for row in rows]


def estimate_exploratory(
    study: Study, outcomes: Mapping[str, Outcomes], *, questions: Sequence[str]
) -> pl.DataFrame:
    """Every estimate that is not registered: ``ESTIMATES_SCHEMA``.

    Args:
        outcomes: Outcome rows of every cell of the grid by key, and the ``baseline``'s.
        questions: The ids of the bank's evaluation questions.

    Raises:
        MissingCells, BadOutcomes: anything but exactly those rows.
    """
    answers = Answers(study, outcomes, questions=questions, scaffolds=study.scaffolds)
    return estimates_table(study, exploratory(study), answers)
