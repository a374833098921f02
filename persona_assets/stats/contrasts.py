"""The registered contrasts, their multiplicity correction, and the loss matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import polars as pl

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.stats.estimands import MACRO, registered
from persona_assets.stats.estimates import (
    ESTIMATES_SCHEMA,
    HEADLINE_SCHEME,
    SCHEMES,
    estimates_table,
)
from persona_assets.stats.losses import AXES, Answers, Outcomes, axis_size
from persona_assets.stats.multiplicity import holm
from persona_assets.study import Cell, Contrast, Study
from persona_assets.study_schema import Axis

__all__ = [
    "CONTRASTS_SCHEMA",
    "EQUIVALENCE_SCHEMA",
    "ESTIMATES_SCHEMA",
    "HEADLINE_SCHEME",
    "LOSSES_SCHEMA",
    "MACRO",
    "SCHEMES",
    "Multiplicity",
    "estimate_contrast",
    "loss_matrix",
    "multiplicity_table",
]

#: The registered estimates. ``p_holm`` is Holm's, over the macro rows of a scheme; null elsewhere.
CONTRASTS_SCHEMA = pl.Schema(
    {
        "contrast": pl.String,
        "axis": pl.String,
        "hypothesis": pl.String,
        "scope": pl.String,
        "scheme": pl.String,
        "estimate": pl.Float64,
        "ci_low": pl.Float64,
        "ci_high": pl.Float64,
        "std_error": pl.Float64,
        "p_value": pl.Float64,
        "p_holm": pl.Float64,
        "n_pairs": pl.Int64,
        "n_resamples": pl.Int64,
    }
)
#: The equivalence tests, one row a test and scheme; the interval is the test's own.
EQUIVALENCE_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("contrast", "axis", "hypothesis", "scope", "scheme"), pl.String),
        **dict.fromkeys(("estimate", "margin", "alpha", "ci_low", "ci_high"), pl.Float64),
        "equivalent": pl.Boolean,
    }
)
LOSSES_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("arm", "scaffold", "axis", "scope"), pl.String),
        "loss": pl.Float64,
        "loss_sum": pl.Int64,
        "n_personas": pl.Int64,
        "n_pairs": pl.Int64,
    }
)


def estimate_contrast(
    study: Study,
    contrast: Contrast,
    outcomes_by_cell: Mapping[str, Outcomes],
    *,
    questions: Sequence[str],
) -> pl.DataFrame:
    """Macro and per-source estimates of one contrast under both resampling schemes.

    Args:
        outcomes_by_cell: Outcome rows by cell key, in memory or scanned; must hold every cell of
            ``study.contrast_cells(contrast)``, and no other is read.
        questions: The ids of the bank's evaluation questions.

    Returns:
        ``ESTIMATES_SCHEMA``, one row a scope × scheme; ``equivalence`` is empty but for the macro
        rows of a contrast that registers such tests.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the rows of ``study.contrast_cells``.
    """
    answers = Answers(
        study, outcomes_by_cell, questions=questions, scaffolds=(study.inference.scaffold,)
    )
    return estimates_table(study, [registered(study, contrast)], answers)


class Multiplicity(NamedTuple):
    """The family's tables: ``CONTRASTS_SCHEMA`` and ``EQUIVALENCE_SCHEMA``."""

    contrasts: pl.DataFrame
    equivalence: pl.DataFrame


def multiplicity_table(study: Study, estimates: Sequence[pl.DataFrame]) -> Multiplicity:
    """Holm's correction over the macro contrasts, within each scheme; and the equivalence tests.

    Args:
        estimates: The frames of :func:`estimate_contrast`, one a registered contrast, any order.

    Returns:
        ``contrasts`` in the study's order with ``p_holm`` set for macro rows; ``equivalence``
        with one row a registered test and scheme.

    Raises:
        ValueError: a registered contrast is absent, repeated, or not registered: the family
            would not be the pre-registered one.
    """
    stacked = pl.concat([pl.DataFrame(schema=ESTIMATES_SCHEMA), *estimates])
    family = [registered(study, contrast).key for contrast in study.contrast_list]
    adjusted = pl.concat(
        _adjusted(stacked.filter(scope=MACRO, scheme=scheme), f"{MACRO}/{scheme}", family)
        for scheme in SCHEMES
    )
    order = pl.DataFrame({"estimand": family}).with_row_index("rank")
    contrasts = (
        stacked.join(adjusted, on="number_id", how="left", maintain_order="left")
        .with_columns(estimand=pl.col("number_id").str.replace("/[^/]+/[^/]+$", ""))
        .join(order, on="estimand", how="left", maintain_order="left")
        .sort("rank", maintain_order=True)
    )
    tests = (
        contrasts.drop("ci_low", "ci_high")
        .explode("equivalence", empty_as_null=True)
        .filter(pl.col("equivalence").is_not_null())
        .unnest("equivalence")
    )
    return Multiplicity(
        contrasts.select(CONTRASTS_SCHEMA.names()), tests.select(EQUIVALENCE_SCHEMA.names())
    )


def _adjusted(macro: pl.DataFrame, ending: str, family: Sequence[str]) -> pl.DataFrame:
    """Holm's p by number id, over exactly the family of one scheme."""
    found, wanted = macro["number_id"].to_list(), [f"{key}/{ending}" for key in family]
    if sorted(found) != sorted(wanted):
        absent, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
        repeated = sorted({name for name in found if found.count(name) > 1})
        raise ValueError(
            f"the family is not the registered one: absent {absent}, unregistered {extra}, "
            f"repeated {repeated}. Pass each registered contrast once."
        )
    return macro.select("number_id", p_holm=pl.Series(holm(macro["p_value"]), dtype=pl.Float64))


def loss_matrix(
    study: Study,
    baseline: Outcomes,
    outcomes_by_cell: Mapping[str, Outcomes],
    *,
    questions: Sequence[str],
) -> pl.DataFrame:
    """Mean loss of every arm under every scaffold on both axes, macro and by source.

    Args:
        baseline: The untrained model's outcome rows.
        outcomes_by_cell: Outcome rows of every cell of the grid, by key.
        questions: The ids of the bank's evaluation questions.

    Returns:
        ``LOSSES_SCHEMA``: ``loss`` = ``loss_sum`` / (``n_personas`` · ``n_pairs``), where a pair
        is a (source, seed, question) and ``n_personas`` is 1, or the number of bystanders.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the grid's rows.
    """
    keys = [cell.key for cell in study.cells]
    answers = Answers(
        study,
        {**outcomes_by_cell, BASELINE: baseline},
        questions=questions,
        scaffolds=study.scaffolds,
    )
    answers.require(keys, "the loss matrix")
    by_cell = pl.DataFrame(
        [
            {
                "arm": cell.arm,
                "scaffold": scaffold,
                "axis": axis,
                "scope": cell.source,
                "n_personas": axis_size(study, axis),
                "loss_sum": loss_sum,
                "n_pairs": len(questions),
            }
            for cell in study.cells
            for axis in AXES
            for scaffold, loss_sum in zip(
                study.scaffolds, _loss_sums(answers, cell, axis), strict=True
            )
        ]
    )
    scopes = pl.concat([by_cell.with_columns(scope=pl.lit(MACRO)), by_cell])
    return (
        scopes.group_by("arm", "scaffold", "axis", "scope", "n_personas", maintain_order=True)
        .agg(pl.sum("loss_sum", "n_pairs"))
        .with_columns(loss=pl.col("loss_sum") / (pl.col("n_personas") * pl.col("n_pairs")))
        .select(LOSSES_SCHEMA.names())
    )


def _loss_sums(answers: Answers, cell: Cell, axis: Axis) -> list[int]:
    """The summed loss of one cell under each scaffold."""
    base, own = (answers.right(key, cell.source, axis) for key in (BASELINE, cell.key))
    return (base - own).sum(axis=1).tolist()
