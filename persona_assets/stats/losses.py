"""From outcome rows to integer losses: which rows an estimate needs, and exactly those.

``loss = correct_baseline − correct_cell``. The bystander axis is kept as the integer *sum* over
the bystanders and divided once, at the end: means of tenths break ties (ten losses of ±0.1 gave
p = 0.176 where the exact value is 0.2996).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import polars as pl

from persona_assets.study import Study
from persona_assets.study_schema import Axis

AXES: tuple[Axis, ...] = get_args(Axis)
_ROW = ("persona", "scaffold", "question_id")
_SHOWN = 10

#: One cell's outcome rows, in memory or scanned; only four columns of it are read.
Outcomes = pl.DataFrame | pl.LazyFrame


class MissingCells(ValueError):
    """An estimate was asked for before all the cells of its definition had outcomes.

    Attributes:
        cells: The keys of the cells without outcomes, in grid order.
    """

    def __init__(self, cells: Sequence[str], wanted_by: str):
        self.cells = tuple(cells)
        super().__init__(
            f"{wanted_by} needs the outcomes of {len(self.cells)} more cell(s): "
            f"{', '.join(self.cells)}. Evaluate them first; nothing is estimated over fewer cells."
        )


class BadOutcomes(ValueError):
    """Outcome rows of one cell that are missing, repeated, unreadable or not the grid's.

    Attributes:
        cell: The cell's key, or ``baseline``.
        rows: Every faulty (persona, scaffold, question_id).
    """

    def __init__(self, cell: str, what: str, rows: Iterable[tuple[str, str, str]], remedy: str):
        self.cell, self.rows = cell, tuple(rows)
        shown = "; ".join("/".join(map(str, row)) for row in self.rows[:_SHOWN])
        more = f"; and {len(self.rows) - _SHOWN} more" if len(self.rows) > _SHOWN else ""
        super().__init__(
            f"outcomes of {cell}: {len(self.rows)} row(s) {what} "
            f"(persona/scaffold/question): {shown}{more}. {remedy}"
        )


def axis_personas(study: Study, source: str, axis: Axis) -> tuple[str, ...]:
    """The personas whose losses an axis sums for one source: itself, or its bystanders."""
    return (source,) if axis == "source_loss" else study.bystanders(source)


def axis_size(study: Study, axis: Axis) -> int:
    """How many personas an axis sums over: the divisor that turns the sum into their mean."""
    return 1 if axis == "source_loss" else len(study.personas) - 1


def require_cells(wanted: Iterable[str], given: Mapping[str, object], wanted_by: str) -> None:
    """Raises :class:`MissingCells` naming every key of ``wanted`` that ``given`` lacks."""
    if missing := [key for key in wanted if key not in given]:
        raise MissingCells(missing, wanted_by)


def correct_table(
    study: Study,
    outcomes: Outcomes,
    *,
    cell: str,
    scaffolds: Sequence[str],
    questions: Sequence[str],
) -> pl.DataFrame:
    """Whether each answer was right, one row a (scaffold, question), one 0/1 column a persona.

    Args:
        outcomes: Rows with ``persona``, ``scaffold``, ``question_id`` and boolean
            ``is_correct``; rows under other scaffolds are not looked at.
        cell: The cell's key, to name it in errors.
        scaffolds: The scaffolds to keep.
        questions: The ids of the bank's evaluation questions.

    Returns:
        Columns ``scaffold``, ``question_id``, then every persona (Int64), in the order of
        ``scaffolds`` × ``questions``.

    Raises:
        BadOutcomes: not exactly one row a persona × scaffold × question.
    """
    rows = (
        outcomes.lazy()
        .select(*_ROW, pl.col("is_correct").cast(pl.Int64))
        .filter(pl.col("scaffold").is_in(list(scaffolds)))
        .collect()
    )
    _require_exact_rows(rows, cell, tuple(study.personas), scaffolds, questions)
    order = pl.DataFrame(
        list(itertools.product(scaffolds, questions)),
        schema={"scaffold": pl.String, "question_id": pl.String},
        orient="row",
    )
    wide = rows.pivot("persona", index=["scaffold", "question_id"], values="is_correct")
    return order.join(
        wide, on=["scaffold", "question_id"], how="left", maintain_order="left"
    ).select("scaffold", "question_id", *study.personas)


def _require_exact_rows(
    rows: pl.DataFrame,
    cell: str,
    personas: Sequence[str],
    scaffolds: Sequence[str],
    questions: Sequence[str],
) -> None:
    expected = pl.DataFrame(
        list(itertools.product(personas, scaffolds, questions)),
        schema=dict.fromkeys(_ROW, pl.String),
        orient="row",
    )
    again = "Evaluate the cell again."
    problems = (
        (expected.join(rows, on=_ROW, how="anti"), "missing", again),
        (rows.filter(pl.struct(_ROW).is_duplicated()).unique(_ROW), "repeated", again),
        (
            rows.join(expected, on=_ROW, how="anti"),
            "not of this study's grid",
            "They come from another study file or question bank: evaluate the cell again.",
        ),
        (rows.filter(pl.col("is_correct").is_null()), "without is_correct", again),
    )
    for faulty, what, remedy in problems:
        if faulty.height:
            raise BadOutcomes(cell, what, faulty.select(_ROW).sort(_ROW).rows(), remedy)


def axis_correct(study: Study, table: pl.DataFrame, source: str, axis: Axis) -> pl.Series:
    """Right answers on an axis, one integer a row of a :func:`correct_table`."""
    return table.select(pl.sum_horizontal(axis_personas(study, source, axis))).to_series()
