"""Where a number comes from: its lineage down to the question rows, and whether it comes out again.

Reads the warehouse alone: the file is a complete record of the study.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_assets.reporting.ledger import Ledger, Number
from persona_assets.reporting.queries import Row, open_warehouse, rows
from persona_assets.reporting.views import VIEWS
from persona_assets.reporting.words import text_table, visible
from persona_assets.stats.bootstrap import bootstrap_mean
from persona_assets.stats.multiplicity import holm
from persona_assets.stats.vocabulary import bootstrap_questions

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class Trace:
    """A number, where it comes from, and what came out when it was made again.

    Attributes:
        number: The number as it stands in the ledger.
        study: The row of the table ``study``: title and hashes.
        cells: The rows of the table ``cells`` that it is made from.
        again: The same fields, made again from SQL, estimator, B and seed; only those that are
            not null in the ledger.
        views: Of each stored view that its SQL reads, whether it is, for these cells, what the
            outcome rows give.
    """

    number: Number
    study: Row
    cells: list[Row]
    again: dict[str, float]
    views: dict[str, bool]

    @property
    def reproduced(self) -> dict[str, bool]:
        """For each field made again, whether it is equal to the last bit; and :attr:`views`."""
        same = {name: getattr(self.number, name) == value for name, value in self.again.items()}
        return same | self.views


#: Makes a number's interval, standard error and p again.
Resampled = Callable[[Number], dict[str, float]]

_ESTIMATORS = {"bootstrap mean": bootstrap_mean, "bootstrap questions": bootstrap_questions}


def read_ledger(db: duckdb.DuckDBPyConnection) -> Ledger:
    """The ledger of an open warehouse."""
    return Ledger(Number.from_row(row) for row in rows(db, "SELECT * FROM numbers"))


def trace(warehouse: Path, number_id: str) -> Trace:
    """Look a number up and make it again.

    Raises:
        UnknownNumber: there is no such number; suggests the nearest.
        duckdb.Error: the warehouse cannot be read.
    """
    with open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        number = ledger[number_id]
        (study,) = rows(db, "SELECT * EXCLUDE (definition) FROM study")
        cells = rows(
            db,
            "SELECT * FROM cells WHERE list_contains($cells, cell) ORDER BY cell",
            cells=list(number.cells),
        )
        return Trace(number, study, cells, remade(db, ledger, number), _views(db, number))


def _views(db: duckdb.DuckDBPyConnection, number: Number) -> dict[str, bool]:
    """The stored views that a number's SQL reads, held against the rows they were made from."""
    found = {}
    for name, view in VIEWS.items():
        if view.stored and name in number.sql:
            rows = f"(SELECT * FROM ({view.sql}) WHERE list_contains($cells, cell))"
            kept = f"(SELECT * FROM {name} WHERE list_contains($cells, cell))"
            differing = f"({rows} EXCEPT ALL {kept}) UNION ALL ({kept} EXCEPT ALL {rows})"
            sql = f"SELECT count(*) FROM ({differing})"
            found[name] = db.execute(sql, {"cells": list(number.cells)}).fetchone() == (0,)
    return found


def remade(db: duckdb.DuckDBPyConnection, ledger: Ledger, number: Number) -> dict[str, float]:
    """Value, interval, standard error and p of a number, from SQL and estimator."""
    return _remade(db, ledger, number, partial(_resampled, db))


def _remade(
    db: duckdb.DuckDBPyConnection, ledger: Ledger, number: Number, resampled: Resampled
) -> dict[str, float]:
    again = {"value": value_of(db, number)}
    if number.number_id.endswith("/se_ratio"):
        key = number.number_id.removesuffix("/se_ratio")
        question, pairs = (
            resampled(ledger[f"{key}/{scheme}"])["std_error"] for scheme in ("question", "pairs")
        )
        again["value"] = question / pairs
    if number.estimator != "exact":
        again |= resampled(number)
    if number.p_holm is not None:
        again["p_holm"] = _adjusted(ledger, number, resampled)
    return again


def value_of(db: duckdb.DuckDBPyConnection, number: Number) -> float:
    """What a number's SQL returns; NaN for NULL.

    Raises:
        ValueError: it returns anything but one row of one column.
    """
    found = db.execute(number.sql).fetchall()
    if len(found) != 1 or len(found[0]) != 1:
        raise ValueError(f"{number.number_id}: its SQL returns {len(found)} rows, not one value")
    return math.nan if found[0][0] is None else float(found[0][0])


def count_of(db: duckdb.DuckDBPyConnection, number: Number) -> int:
    """How many rows of the warehouse are behind a number."""
    return db.execute(f"SELECT count(*) FROM (\n{number.rows_sql}\n)").fetchone()[0]


def evaluated(db: duckdb.DuckDBPyConnection, numbers: Iterable[Number]) -> tuple[Ledger, list[str]]:
    """The ledger whose values the SQL over ``db`` returned, and where the statistics disagree.

    While it runs there is a table ``numbers``, which the SQL of ratios reads.

    Returns:
        The ledger, less what is not defined (a ratio to a standard error of 0); and one sentence
        for each number whose value the statistics had otherwise.
    """
    numbers = list(numbers)
    errors = [(n.number_id, n.std_error) for n in numbers if n.std_error is not None]
    db.execute("CREATE TEMP TABLE numbers (number_id VARCHAR, std_error DOUBLE)")
    db.executemany("INSERT INTO numbers VALUES (?, ?)", errors)
    found, disagreements = [], []
    for number in numbers:
        value = value_of(db, number)
        if math.isnan(value):
            continue
        if not math.isnan(number.value) and value != number.value:
            disagreements.append(f"{number.number_id}: {number.value!r}, by SQL {value!r}")
        found.append(replace(number, value=value, n=number.n or count_of(db, number)))
    db.execute("DROP TABLE numbers")
    return Ledger(found), disagreements


def not_reproduced(db: duckdb.DuckDBPyConnection) -> list[str]:
    """One sentence for each field of a warehouse's numbers that does not come out again.

    Of every number the value by its SQL; of the registered contrasts, macro and by source, and
    their equivalence tests, also interval, standard error and p by the estimator.
    """
    ledger, found = read_ledger(db), []
    resampled = cache(partial(_resampled, db))  # each again in the Holm adjustment of its family
    for number in ledger.values():
        if number.number_id.startswith("contrast/"):
            again = _remade(db, ledger, number, resampled)
        else:
            again = {"value": value_of(db, number)}
        found += [
            f"{number.number_id}, {name}: {getattr(number, name)!r}, made again {value!r}"
            for name, value in again.items()
            if getattr(number, name) != value
        ]
    return found


def _resampled(db: duckdb.DuckDBPyConnection, number: Number) -> dict[str, float]:
    estimator = _ESTIMATORS[number.estimator]
    result = estimator(
        db.execute(number.sample_sql).fetchnumpy()["value"],
        unit=number.divisor,
        seed=number.rng_seed,
        number_id=number.rng_stream,
        n_resamples=number.n_resamples,
    )
    low, high = result.interval(number.confidence)
    found = {
        "ci_low": low,
        "ci_high": high,
        "std_error": result.std_error,
        "p_value": result.p_value,
    }
    return {name: value for name, value in found.items() if getattr(number, name) is not None}


def _adjusted(ledger: Ledger, number: Number, resampled: Resampled) -> float:
    """Holm's adjustment over the number's family, every p-value made again."""
    scheme = number.number_id.rpartition("/")[2]
    family = [
        other
        for other in ledger.values()
        if other.p_holm is not None and other.number_id.endswith(f"/{scheme}")
    ]
    adjusted = holm([resampled(member)["p_value"] for member in family])
    return float(adjusted[family.index(number)])


def as_json(found: Trace) -> dict[str, Any]:
    """A trace for programs: JSON-representable."""
    number = {name: getattr(found.number, name) for name in Number.__slots__}
    return {
        "number": number | {"cells": list(found.number.cells)},
        "again": found.again,
        "reproduced": found.reproduced,
        "views": found.views,
        "study": found.study,
        "cells": found.cells,
    }


def question_rows(warehouse: Path, number: Number, limit: int) -> list[Row]:
    """The first rows of the warehouse behind a number."""
    with open_warehouse(warehouse) as db:
        return rows(db, f"SELECT * FROM (\n{number.rows_sql}\n) LIMIT {int(limit)}")


_FIELDS = ("value", "ci_low", "ci_high", "std_error", "p_value", "p_holm")
_OF_CELL = (
    *("cell", "origin", "checkpoint_run_id", "outcomes_run_id", "checkpoint_sha256"),
    *("dataset_sha256", "outcomes_sha256", "checkpoint_seconds", "outcomes_seconds"),
    *("reference_dataset_sha256", "checkpoint_source", "checkpoint_device", "outcomes_device"),
    *("study_sha256", "code_version", "engine", "software"),
)


def as_text(found: Trace, shown: list[Row] | None) -> str:
    """A trace for a person, with the rows ``shown`` if there are any."""
    number = found.number
    lines = [number.number_id, f"  {number.formula}", f"  unit: {number.unit}; n = {number.n}"]
    for name in _FIELDS:
        value = getattr(number, name)
        if value is None:
            continue
        state = "" if name not in found.reproduced else "reproduced to the last digit"
        if found.reproduced.get(name) is False:
            state = f"NOT reproduced: {found.again[name]!r}"
        lines.append(f"  {name:<10} {value!r:<24} {state}".rstrip())
    if number.estimator != "exact":
        lines.append(
            f"  {number.estimator}: B = {number.n_resamples}, interval of {number.confidence:g}, "
            f"stream sha256({number.rng_seed}/{number.rng_stream})"
        )
    for view, same in found.views.items():
        state = "what the outcome rows give" if same else "NOT what the outcome rows give"
        lines.append(f"  {view} is, for these cells, {state}")
    lines += ["", "SQL of the value:", *(f"  {line}" for line in number.sql.splitlines())]
    if number.sample_sql is not None:
        lines += ["", "SQL of what is resampled:"]
        lines += [f"  {line}" for line in number.sample_sql.splitlines()]
    lines += ["", "Study:", *(f"  {name}: {value}" for name, value in found.study.items())]
    if found.cells:
        lines += ["", *_cells_text(found.cells)]
    if shown is not None:
        lines += ["", f"Rows (first {len(shown)}):"]
        if shown:
            lines.append(text_table(list(shown[0]), [list(row.values()) for row in shown]))
    return "\n".join(lines)


def _cells_text(cells: list[Row]) -> list[str]:
    """The cells of a number: what they have in common once, the rest as a table.

    Hashes are cut to twelve digits; ``--json`` has them whole.
    """
    alike = [name for name in _OF_CELL if len({cell[name] for cell in cells}) == 1]
    names = ["cell", *(name for name in _OF_CELL[1:] if name not in alike)]
    values = [
        [str(cell[name])[:12] if name.endswith("_sha256") else cell[name] for name in names]
        for cell in cells
    ]
    return [
        f"Cells ({len(cells)}):",
        text_table(names, values),
        *(f"  {name}: {visible(str(cells[0][name]))}" for name in alike if name != "cell"),
    ]
