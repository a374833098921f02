"""Which numbers a study's report may print, each with the SQL that recomputes it.

Estimates come from the statistics; their SQL is written here from the definitions alone, over the
warehouse's outcome rows, so that the two are independent and are compared to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.reporting import vocabulary_sql
from persona_assets.reporting.diagnostic_numbers import diagnostic_numbers
from persona_assets.reporting.ledger import Number
from persona_assets.reporting.views import literal
from persona_assets.stats.estimands import MACRO
from persona_assets.stats.losses import axis_size
from persona_assets.study import Study

_LOSS = "loss in accuracy (baseline's share of right answers less the cell's)"
_SHARE = "share of right answers"
_COLUMNS = (
    "cell, persona, scaffold, question_id, correct_letter, predicted_letter, is_correct, run_id"
)


@dataclass(frozen=True, slots=True)
class Tables:
    """What the statistics have landed.

    Attributes:
        estimates: ``ESTIMATES_SCHEMA``: registered and exploratory estimates.
        contrasts: ``CONTRASTS_SCHEMA``: for the p-values adjusted over the family.
        losses: ``LOSSES_SCHEMA``.
        checks: ``warehouse.CHECKS_SCHEMA``: what was checked.
        vocabulary: ``VOCABULARY_SCHEMA``; None where the study has no such measure.
    """

    estimates: pl.DataFrame
    contrasts: pl.DataFrame
    losses: pl.DataFrame
    checks: pl.DataFrame
    vocabulary: pl.DataFrame | None = None


def study_numbers(study: Study, tables: Tables) -> Iterator[Number]:
    """Every number of the study, values as the statistics have them where they have any.

    The value of a number that the statistics do not make is what its SQL returns: NaN until
    :func:`persona_assets.reporting.trace.evaluated` has run it.
    """
    adjusted = {
        (row["contrast"], row["axis"], row["scope"], row["scheme"]): row["p_holm"]
        for row in tables.contrasts.iter_rows(named=True)
    }
    for row in tables.estimates.iter_rows(named=True):
        key = (row["contrast"], row["axis"], row["scope"], row["scheme"])
        p_holm = adjusted.get(key) if row["kind"] == "contrast" else None
        numbers = list(_estimate(study, row, p_holm))
        yield from numbers
        if key[2:] == (MACRO, "question") and row["kind"] == "contrast":
            yield from _less_published(study, row, numbers[0])
    for row in tables.losses.iter_rows(named=True):
        yield _loss(study, row)
    if tables.vocabulary is not None:
        for row in tables.vocabulary.iter_rows(named=True):
            yield _vocabulary(study, row)
    yield from _accuracies(study)
    yield from diagnostic_numbers(study, tables.checks)
    yield from _counts(study)
    yield from _seconds(study)


def _estimate(study: Study, row: Mapping[str, Any], p_holm: float | None) -> Iterator[Number]:
    sample, rows = _sample_sql(study, row), _difference_rows(study, row)
    base = _Base(study, row, sample, rows)
    yield base.number(
        row["number_id"],
        ci=(row["ci_low"], row["ci_high"], study.inference.confidence),
        p_value=row["p_value"],
        p_holm=p_holm,
    )
    for test in row["equivalence"]:
        level = 1 - 2 * test["alpha"]
        yield base.number(
            f"{row['number_id']}/equivalence_{test['margin']:g}",
            ci=(test["ci_low"], test["ci_high"], level),
        )
    if row["scheme"] == "pairs":
        yield from _by_seed(study, row, rows)
    else:
        yield _error_ratio(row, rows)


@dataclass(frozen=True, slots=True)
class _Base:
    """A resampled estimate, of which a number shows one interval."""

    study: Study
    row: Mapping[str, Any]
    sample: str
    rows: str

    def number(
        self,
        number_id: str,
        ci: tuple[float, float, float],
        p_value: float | None = None,
        p_holm: float | None = None,
    ) -> Number:
        row = self.row
        return Number(
            number_id,
            row["estimate"],
            _LOSS,
            row["n_values"],
            _formula(self.study, row),
            f"SELECT sum(value) / (count(*) * {row['unit']})\nFROM (\n{_indented(self.sample)}\n)",
            self.rows,
            tuple(row["evaluations"]),
            *ci,
            row["std_error"],
            p_value,
            p_holm,
            self.sample,
            "bootstrap mean",
            row["unit"],
            row["n_resamples"],
            self.study.seed,
            row["number_id"],
        )


def _by_seed(study: Study, row: Mapping[str, Any], rows: str) -> Iterator[Number]:
    """The point estimate of each seed, and their standard deviation."""
    key = row["number_id"].removesuffix("/pairs")
    common = {"unit": _LOSS, "rows_sql": rows, "cells": tuple(row["evaluations"])}
    by_seed = _sample_sql(study, row, "seed, ")
    for entry in row["by_seed"]:
        yield Number(
            f"{key}/seed_{entry['seed']}",
            entry["estimate"],
            n=row["n_pairs"] // len(row["by_seed"]),
            formula=f"{_formula(study, row)} Of seed {entry['seed']} alone.",
            sql=f"SELECT sum(value) / (count(*) * {row['unit']})\nFROM (\n{_indented(by_seed)}\n)\n"
            f"WHERE seed = {entry['seed']}",
            **common,
        )
    if row["seed_sd"] is not None:
        # Integers up to the root, as the statistics do it: the same to the last bit.
        totals = "SELECT seed, sum(value)::BIGINT AS total, count(*) AS n\nFROM (\n"
        totals += f"{_indented(by_seed)}\n)\nGROUP BY seed"
        yield Number(
            f"{key}/seed_sd",
            row["seed_sd"],
            n=len(row["by_seed"]),
            formula="Standard deviation (n - 1) of the estimates of the single seeds.",
            sql="SELECT sqrt((count(*) * sum(total * total) - sum(total) * sum(total))\n"
            f"    / (count(*) * (count(*) - 1))) / (max(n) * {row['unit']})\n"
            f"FROM (\n{_indented(totals)}\n)",
            **common,
        )


def _error_ratio(row: Mapping[str, Any], rows: str) -> Number:
    """The two standard errors are the ledger's own: ``trace`` makes both again."""
    key = row["number_id"].removesuffix("/question")
    error = "(SELECT std_error FROM numbers WHERE number_id = {})".format
    ratio = row["se_ratio"]
    return Number(
        f"{key}/se_ratio",
        float("nan") if ratio is None else ratio,
        "ratio",
        2,
        "Standard error with questions drawn over that with pairs drawn.",
        f"SELECT {error(literal(f'{key}/question'))}\n"
        f"    / nullif({error(literal(f'{key}/pairs'))}, 0)",
        rows,
        tuple(row["evaluations"]),
    )


def _formula(study: Study, row: Mapping[str, Any]) -> str:
    a, b = (f"{row[f'arm_{side}']} under {row[f'scaffold_{side}']}" for side in "ab")
    over = "all sources" if row["scope"] == MACRO else f"source {row['scope']}"
    personas = (
        "the source persona"
        if row["axis"] == "source_loss"
        else f"the mean over the {axis_size(study, row['axis'])} bystanders"
    )
    drawn = (
        "questions, each with all its sources and seeds"
        if row["scheme"] == "question"
        else "(source, seed, question) triples"
    )
    return (
        f"Mean loss of {a} less that of {b}, for {personas}, paired by source, seed and question "
        f"over {over}; the interval draws {drawn}."
    )


def _sources(study: Study, row: Mapping[str, Any]) -> Sequence[str]:
    return (
        study.shared_sources(row["arm_a"], row["arm_b"])
        if row["scope"] == MACRO
        else [row["scope"]]
    )


def _sides(row: Mapping[str, Any]) -> tuple[str, str]:
    """The conditions that pick the rows of either side."""
    a, b = (
        f"arm = {literal(row[f'arm_{side}'])} AND scaffold = {literal(row[f'scaffold_{side}'])}"
        for side in "ab"
    )
    return a, b


def _sample_sql(study: Study, row: Mapping[str, Any], *more: str) -> str:
    """The integers that are resampled; ``more`` names further columns to keep pairs apart by."""
    a, b = _sides(row)
    pairs = row["scheme"] == "pairs"
    columns = "".join(more)
    by = "source, seed, question_id" if pairs else "question_id"
    return (
        f"SELECT {columns}sum(CASE WHEN {a} THEN loss ELSE -loss END)::BIGINT AS value\n"
        "FROM question_losses\n"
        f"WHERE axis = {literal(row['axis'])} AND source IN ({_listed(_sources(study, row))})\n"
        f"    AND ({a} OR {b})\n"
        f"GROUP BY {by}"
    )


def _difference_rows(study: Study, row: Mapping[str, Any]) -> str:
    a, b = _sides(row)
    person = "is_source" if row["axis"] == "source_loss" else "NOT is_source"
    return (
        f"SELECT {_COLUMNS} FROM outcomes\n"
        f"WHERE {person} AND source IN ({_listed(_sources(study, row))})\n"
        f"    AND ({a} OR {b})\n"
        "ORDER BY source, seed, question_id, persona, arm, scaffold"
    )


def _loss(study: Study, row: Mapping[str, Any]) -> Number:
    macro = row["scope"] == MACRO
    where = f"arm = {literal(row['arm'])} AND scaffold = {literal(row['scaffold'])}"
    where += "" if macro else f" AND source = {literal(row['scope'])}"
    person = "is_source" if row["axis"] == "source_loss" else "NOT is_source"
    cells = tuple(
        cell.key
        for cell in study.cells
        if cell.arm == row["arm"] and (macro or cell.source == row["scope"])
    )
    return Number(
        f"loss/{row['arm']}/{row['scaffold']}/{row['axis']}/{row['scope']}",
        row["loss"],
        _LOSS,
        row["n_pairs"],
        f"Mean over sources, seeds and questions of the {row['axis'].replace('_', ' ')} of "
        f"{row['arm']} under {row['scaffold']}.",
        "SELECT sum(loss) / sum(n_personas)\nFROM question_losses\n"
        f"WHERE axis = {literal(row['axis'])} AND {where}",
        f"SELECT {_COLUMNS} FROM outcomes\nWHERE {person} AND {where}\n"
        "ORDER BY source, seed, question_id, persona",
        (*cells, BASELINE),
    )


def _vocabulary(study: Study, row: Mapping[str, Any]) -> Number:
    sample = vocabulary_sql.rows_sql(study, row)
    over = "the baseline" if row["quantity"] == "increase" else "the second arm"
    return Number(
        row["number_id"],
        row["estimate"],
        "share of a rationale's words",
        row["n_values"],
        f"Share of words of the source's lexicon, {row['name']} less {over}, under "
        f"{row['scaffold']}, {row['axis'].replace('_', ' ')}; the interval draws questions.",
        vocabulary_sql.point_sql(study, row),
        sample,
        tuple(row["evaluations"]),
        row["ci_low"],
        row["ci_high"],
        study.inference.confidence,
        row["std_error"],
        row["p_value"],
        None,
        sample,
        "bootstrap questions",
        row["unit"],
        row["n_resamples"],
        study.seed,
        row["number_id"],
    )


def _less_published(study: Study, row: Mapping[str, Any], ours: Number) -> Iterator[Number]:
    """How far a registered estimate is from the earlier experiment's, where the file has one.

    The earlier value is a literal of the SQL: the warehouse holds this study's rows alone.
    """
    earlier = study.contrast(f"{row['contrast']}.{row['axis']}").published
    if earlier is not None:
        yield Number(
            ours.number_id.removesuffix("question") + "less_published",
            float("nan"),
            _LOSS,
            ours.n,
            f"{ours.formula} Less the {earlier.estimate:g} that was published.",
            f"SELECT (\n{_indented(ours.sql)}\n) - ({earlier.estimate!r})",
            ours.rows_sql,
            ours.cells,
        )


def _accuracies(study: Study) -> Iterator[Number]:
    """The untrained model's, over all personas and for each."""
    for scaffold in study.scaffolds:
        for persona in (None, *study.personas):
            where = f"cell = {literal(BASELINE)} AND scaffold = {literal(scaffold)}"
            where += f" AND persona = {literal(persona)}" if persona else ""
            yield Number(
                "/".join(["accuracy", BASELINE, scaffold, *([persona] if persona else [])]),
                float("nan"),
                _SHARE,
                0,
                f"Share of right answers of the untrained model under {scaffold}, "
                + (f"asked as {persona}." if persona else "over all personas."),
                f"SELECT count(*) FILTER (is_correct) / count(*)\nFROM outcomes\nWHERE {where}",
                f"SELECT {_COLUMNS} FROM outcomes\nWHERE {where}\nORDER BY question_id, persona",
                (BASELINE,),
            )


def _counts(study: Study) -> Iterator[Number]:
    cells = tuple(cell.key for cell in study.cells)
    made_from = {
        "cells": cells,
        "outcomes": (*cells, BASELINE),
        "outcomes/baseline": (BASELINE,),
        "training_rows": cells,
    } | {f"outcomes/{arm}": tuple(c.key for c in study.cells if c.arm == arm) for arm in study.arms}
    tables = {
        "cells": ("cells", f"cell <> {literal(BASELINE)}", "Cells that were evaluated."),
        "outcomes": ("outcomes", "true", "Outcome rows."),
        "outcomes/baseline": ("outcomes", f"cell = {literal(BASELINE)}", "Rows of the baseline."),
        "questions/eval": ("questions", "split = 'eval'", "Evaluation questions."),
        "questions/train": ("questions", "split = 'train'", "Training questions."),
        "training_rows": ("training_rows", "true", "Training rows of all cells."),
    }
    tables |= {
        f"outcomes/{arm}": ("outcomes", f"arm = {literal(arm)}", f"Outcome rows of {arm}.")
        for arm in study.arms
    }
    for name, (table, where, formula) in tables.items():
        yield Number(
            f"count/{name}",
            float("nan"),
            "rows",
            0,
            formula,
            f"SELECT count(*)\nFROM {table}\nWHERE {where}",
            f"SELECT * FROM {table}\nWHERE {where}",
            made_from.get(name, ()),  # questions are made from no cell
        )
    for arm in study.arms:
        where = f"arm = {literal(arm)}"
        yield Number(
            f"tokens/{arm}",
            float("nan"),
            "tokens a row",
            0,
            f"Mean loss-bearing tokens of a training row of {arm}.",
            f"SELECT sum(loss_tokens) / count(*)\nFROM training_rows\nWHERE {where}",
            f"SELECT cell, question_id, loss_tokens FROM training_rows\nWHERE {where}",
            tuple(cell.key for cell in study.cells if cell.arm == arm),
        )


def _seconds(study: Study) -> Iterator[Number]:
    """Time on the clock, by stage, and by device over both stages that use one."""
    cells = (*(cell.key for cell in study.cells), BASELINE)
    rows = (
        "SELECT cell, checkpoint_seconds, checkpoint_device, outcomes_seconds, outcomes_device\n"
        "FROM cells\nORDER BY cell"
    )

    def spent(stage: str, where: str) -> str:
        milliseconds = f"sum(round(1000 * {stage}_seconds)::BIGINT)"
        return f"coalesce({milliseconds} FILTER ({stage}_device {where}), 0)"

    trained, measured = (spent(stage, "IS NOT NULL") for stage in ("checkpoint", "outcomes"))
    wanted = {
        "training": ("training the cells' adapters", trained),
        "fetching": ("fetching carried-over checkpoints", spent("checkpoint", "IS NULL")),
        "evaluation": ("evaluating the cells and the baseline", measured),
    } | {
        device: (
            f"training and evaluation on {device}",
            " + ".join(
                spent(stage, f"= {literal(device)}") for stage in ("checkpoint", "outcomes")
            ),
        )
        for device in ("cuda", "cpu")
    }
    for name, (what, sql) in wanted.items():
        yield Number(
            f"seconds/{name}",
            float("nan"),
            "seconds",
            0,
            f"Time on the clock of {what}, added up over processes.",
            f"SELECT ({sql}) / 1000\nFROM cells",
            rows,
            cells,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(literal, names))


def _indented(sql: str) -> str:
    return "\n".join(f"    {line}" for line in sql.splitlines())
