"""From outcome rows to integer losses: which rows an estimate needs, and exactly those.

``loss = correct_baseline − correct_cell``. The bystander axis is kept as the integer *sum* over
the bystanders and divided once, at the end: means of tenths break ties (ten losses of ±0.1 gave
p = 0.176 where the exact value is 0.2996).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from persona_assets.study import Study
from persona_assets.study_schema import Axis

AXES: tuple[Axis, ...] = get_args(Axis)
_ROW = ("persona", "scaffold", "question_id")
_SHOWN = 10

#: One cell's outcome rows, in memory or scanned; only four columns of it are read.
Outcomes = pl.DataFrame | pl.LazyFrame
Integers = npt.NDArray[np.int64]


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


class Answers:
    """Which answers were right: each cell's rows are read and checked once, when first asked for.

    Args:
        outcomes: Outcome rows by cell key (and ``baseline``, where an estimate needs it), in
            memory or scanned.
        questions: The ids of the bank's evaluation questions.
        scaffolds: The scaffolds that are looked at; rows under others are not.
    """

    def __init__(
        self,
        study: Study,
        outcomes: Mapping[str, Outcomes],
        *,
        questions: Sequence[str],
        scaffolds: Sequence[str],
    ):
        self.study, self.questions, self.scaffolds = study, questions, tuple(scaffolds)
        self._outcomes = outcomes
        self._read: dict[str, Integers] = {}

    def require(self, cells: Iterable[str], wanted_by: str) -> None:
        """Raises :class:`MissingCells` naming every key of ``cells`` without outcomes."""
        if missing := [key for key in cells if key not in self._outcomes]:
            raise MissingCells(missing, wanted_by)

    def right(self, cell: str, source: str, axis: Axis) -> Integers:
        """Right answers on the axis of ``source``, shape (scaffolds, questions).

        Raises:
            BadOutcomes: anything but exactly the cell's rows.
        """
        if cell not in self._read:
            self._read[cell] = correct_array(
                self.study,
                self._outcomes[cell],
                cell=cell,
                scaffolds=self.scaffolds,
                questions=self.questions,
            )
        personas = list(self.study.personas)
        summed = [personas.index(name) for name in axis_personas(self.study, source, axis)]
        return self._read[cell][:, summed].sum(axis=1)


def correct_array(
    study: Study,
    outcomes: Outcomes,
    *,
    cell: str,
    scaffolds: Sequence[str],
    questions: Sequence[str],
) -> Integers:
    """Whether each answer was right: 0 or 1, shape (scaffolds, personas, questions).

    Args:
        outcomes: Rows with ``persona``, ``scaffold``, ``question_id`` and boolean
            ``is_correct``; rows under other scaffolds are not looked at.
        cell: The cell's key, to name it in errors.
        scaffolds: The scaffolds to keep.
        questions: The ids of the bank's evaluation questions.

    Raises:
        BadOutcomes: not exactly one row a persona × scaffold × question.
    """
    axes = {"scaffold": scaffolds, "persona": list(study.personas), "question_id": questions}
    shape = tuple(len(names) for names in axes.values())
    rows = (
        outcomes.lazy()
        .select(*axes, pl.col("is_correct").cast(pl.Int64))
        .filter(pl.col("scaffold").is_in(list(scaffolds)))
        .collect()
    )
    places = rows.select(
        pl.col(column).replace_strict(
            list(names), range(len(names)), default=None, return_dtype=pl.Int64
        )
        for column, names in axes.items()
    )
    known = places.select(pl.all_horizontal(pl.all().is_not_null())).to_series()
    index = np.ravel_multi_index(places.filter(known).to_numpy().T, shape)
    times = np.bincount(index, minlength=np.prod(shape))
    if not (known.all() and (times == 1).all() and rows["is_correct"].null_count() == 0):
        raise next(_faults(cell, axes, rows, known, times.reshape(shape)))
    right = np.empty(len(index), dtype=np.int64)
    right[index] = rows["is_correct"].to_numpy()
    return right.reshape(shape)


def _faults(
    cell: str,
    axes: Mapping[str, Sequence[str]],
    rows: pl.DataFrame,
    known: pl.Series,
    times: Integers,
) -> Iterator[BadOutcomes]:
    """What is wrong with a cell's rows, fault by fault; ``times`` says how often each occurs."""

    def named(where: npt.NDArray[np.bool_]) -> list[tuple[str, ...]]:
        by_column = {
            column: [names[i] for i in indices]
            for (column, names), indices in zip(axes.items(), np.nonzero(where), strict=True)
        }
        return sorted(zip(*(by_column[column] for column in _ROW), strict=True))

    again = "Evaluate the cell again."
    for faulty, what, remedy in (
        (named(times == 0), "missing", again),
        (named(times > 1), "repeated", again),
        (
            rows.filter(~known).select(_ROW).sort(_ROW).rows(),
            "not of this study's grid",
            "They come from another study file or question bank: evaluate the cell again.",
        ),
        (
            rows.filter(pl.col("is_correct").is_null()).select(_ROW).sort(_ROW).rows(),
            "without is_correct",
            again,
        ),
    ):
        if faulty:
            yield BadOutcomes(cell, what, faulty, remedy)
