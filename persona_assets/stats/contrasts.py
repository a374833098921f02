"""Registered contrasts, their multiplicity correction, and the loss matrix.

Definitions: a contrast is arm a − arm b in mean loss, under the study's registered scaffold. The
baseline cancels in it: loss_a − loss_b = correct_b − correct_a, paired by source, seed and
question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from persona_assets.stats.bootstrap import BootstrapMean, bootstrap_mean
from persona_assets.stats.equivalence import equivalence_test
from persona_assets.stats.losses import (
    AXES,
    Outcomes,
    axis_correct,
    axis_size,
    correct_table,
    require_cells,
)
from persona_assets.stats.multiplicity import holm
from persona_assets.study import Contrast, Study

MACRO = "macro"
#: ``pairs`` draws (source, seed, question) triples; ``question`` draws questions, each with all
#: its sources and seeds, since the same questions recur in every cell. The headline is the latter.
SCHEMES = ("pairs", "question")
HEADLINE_SCHEME = "question"

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
_TEST = {"margin": pl.Float64, "alpha": pl.Float64, "ci_low": pl.Float64, "ci_high": pl.Float64}
#: One contrast's estimates as they land: the ``contrasts`` columns, and the equivalence intervals
#: of the same resamples.
ESTIMATES_SCHEMA = pl.Schema(
    {**CONTRASTS_SCHEMA, "equivalence": pl.List(pl.Struct({**_TEST, "equivalent": pl.Boolean}))}
)
EQUIVALENCE_SCHEMA = pl.Schema(
    {
        **dict.fromkeys(("contrast", "axis", "hypothesis", "scope", "scheme"), pl.String),
        "estimate": pl.Float64,
        **_TEST,
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

Integers = npt.NDArray[np.int64]


def number_id(study: Study, contrast: Contrast, scope: str, scheme: str) -> str:
    """The name of one estimate, which also seeds its random stream."""
    scaffold = study.inference.scaffold
    return f"contrast/{contrast.name}/{scaffold}/{contrast.axis}/{scope}/{scheme}"


def contrast_differences(
    study: Study,
    contrast: Contrast,
    outcomes_by_cell: Mapping[str, Outcomes],
    *,
    questions: Sequence[str],
) -> dict[str, Integers]:
    """Paired differences loss_a − loss_b of each source.

    Returns:
        For each source of the contrast an integer array of shape (seeds, questions), in study
        and bank order; on the bystander axis an entry is the sum over the bystanders.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the rows of ``study.contrast_cells``.
    """
    cells = study.contrast_cells(contrast)
    require_cells((cell.key for cell in cells), outcomes_by_cell, f"the contrast {contrast.key}")
    correct = {}
    for cell in cells:
        table = correct_table(
            study,
            outcomes_by_cell[cell.key],
            cell=cell.key,
            scaffolds=(study.inference.scaffold,),
            questions=questions,
        )
        right = axis_correct(study, table, cell.source, contrast.axis)
        correct[cell.source, cell.arm, cell.seed] = right.to_numpy()
    return {
        source: np.stack(
            [
                correct[source, contrast.b, seed] - correct[source, contrast.a, seed]
                for seed in study.seeds
            ]
        )
        for source in study.contrast_sources(contrast)
    }


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
        ``ESTIMATES_SCHEMA``, one row a scope × scheme; ``p_holm`` is null until the family is
        complete (:func:`multiplicity_table`), ``equivalence`` is empty but for the macro rows of
        a contrast that registers such tests.

    Raises:
        MissingCells, BadOutcomes: anything but exactly the rows of ``study.contrast_cells``.
    """
    by_source = contrast_differences(study, contrast, outcomes_by_cell, questions=questions)
    scopes = {MACRO: np.stack(list(by_source.values()))} | {
        source: differences[np.newaxis] for source, differences in by_source.items()
    }
    rows = [
        _estimate_row(study, contrast, scope, scheme, differences)
        for scope, differences in scopes.items()
        for scheme in SCHEMES
    ]
    return pl.DataFrame(rows, schema=ESTIMATES_SCHEMA, orient="row")


def _estimate_row(
    study: Study, contrast: Contrast, scope: str, scheme: str, differences: Integers
) -> dict[str, object]:
    """One row of ``ESTIMATES_SCHEMA`` from differences of shape (sources, seeds, questions)."""
    result = _bootstrap(study, contrast, scope, scheme, differences)
    low, high = result.interval(study.inference.confidence)
    tests = [
        equivalence_test(result, test.margin, test.alpha)
        for test in (contrast.equivalence if scope == MACRO else ())
    ]
    return {
        "contrast": contrast.name,
        "axis": contrast.axis,
        "hypothesis": contrast.hypothesis,
        "scope": scope,
        "scheme": scheme,
        "estimate": result.estimate,
        "ci_low": low,
        "ci_high": high,
        "std_error": result.std_error,
        "p_value": result.p_value,
        "p_holm": None,
        "n_pairs": differences.size,
        "n_resamples": result.n_resamples,
        "equivalence": [
            {
                "margin": test.margin,
                "alpha": test.alpha,
                "ci_low": test.ci_low,
                "ci_high": test.ci_high,
                "equivalent": test.equivalent,
            }
            for test in tests
        ],
    }


def _bootstrap(
    study: Study, contrast: Contrast, scope: str, scheme: str, differences: Integers
) -> BootstrapMean:
    """Resample pairs, or questions (each the sum over its sources and seeds)."""
    unit = axis_size(study, contrast.axis)
    if scheme == "question":
        n_sources, n_seeds, _ = differences.shape
        differences, unit = differences.sum(axis=(0, 1)), unit * n_sources * n_seeds
    return bootstrap_mean(
        differences,
        unit=unit,
        seed=study.seed,
        number_id=number_id(study, contrast, scope, scheme),
        n_resamples=study.inference.resamples,
    )


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
    family = [contrast.key for contrast in study.contrast_list]
    for scheme in SCHEMES:
        macro = stacked.filter(scope=MACRO, scheme=scheme)
        found = macro.select(pl.concat_str("contrast", "axis", separator=".")).to_series().to_list()
        if sorted(found) != sorted(family):
            absent, extra = sorted(set(family) - set(found)), sorted(set(found) - set(family))
            repeated = sorted({key for key in found if found.count(key) > 1})
            raise ValueError(
                f"the {scheme} family is not the registered one: absent {absent}, "
                f"unregistered {extra}, repeated {repeated}. Pass each registered contrast once."
            )
    adjusted = pl.concat(
        stacked.filter(scope=MACRO, scheme=scheme)
        .select("contrast", "axis", "scope", "scheme", "p_value")
        .with_columns(pl.col("p_value").map_batches(_holm, return_dtype=pl.Float64))
        .rename({"p_value": "p_holm"})
        for scheme in SCHEMES
    )
    keys = ["contrast", "axis", "scope", "scheme"]
    order = pl.DataFrame({"key": family}).with_row_index("rank")
    contrasts = (
        stacked.drop("p_holm")
        .join(adjusted, on=keys, how="left", maintain_order="left")
        .with_columns(pl.concat_str("contrast", "axis", separator=".").alias("key"))
        .join(order, on="key", how="left", maintain_order="left")
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


def _holm(p_values: pl.Series) -> pl.Series:
    return pl.Series(holm(p_values.to_list()), dtype=pl.Float64)


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
    require_cells((cell.key for cell in study.cells), outcomes_by_cell, "the loss matrix")
    grid = {"scaffolds": study.scaffolds, "questions": questions}
    base = correct_table(study, baseline, cell="baseline", **grid)
    parts = []
    for cell in study.cells:
        table = correct_table(study, outcomes_by_cell[cell.key], cell=cell.key, **grid)
        for axis in AXES:
            loss = axis_correct(study, base, cell.source, axis) - axis_correct(
                study, table, cell.source, axis
            )
            parts.append(
                table.select("scaffold", loss.alias("loss"))
                .group_by("scaffold", maintain_order=True)
                .agg(loss_sum=pl.sum("loss"), n_pairs=pl.len().cast(pl.Int64))
                .with_columns(
                    arm=pl.lit(cell.arm),
                    axis=pl.lit(axis),
                    scope=pl.lit(cell.source),
                    n_personas=pl.lit(axis_size(study, axis), pl.Int64),
                )
            )
    by_cell = pl.concat(parts)
    scopes = pl.concat([by_cell.with_columns(scope=pl.lit(MACRO)), by_cell])
    return (
        scopes.group_by("arm", "scaffold", "axis", "scope", "n_personas", maintain_order=True)
        .agg(pl.sum("loss_sum", "n_pairs"))
        .with_columns(loss=pl.col("loss_sum") / (pl.col("n_personas") * pl.col("n_pairs")))
        .select(LOSSES_SCHEMA.names())
    )
