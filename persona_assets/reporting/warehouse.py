"""The study's DuckDB database: everything that has landed, in one shareable file.

Built whole in a temporary folder beside the target and renamed into place, so that a reader of
the old file goes on reading it, and a killed build leaves the old file as it was. (DuckDB lets
one writing process exclude every reader; no evaluation ever writes here.)
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.evaluation import outcomes as outcome_rows
from persona_assets.questions import bank
from persona_assets.reporting.comments import COLUMNS, TABLES
from persona_assets.reporting.queries import rows
from persona_assets.reporting.trace import not_reproduced
from persona_assets.reporting.views import create_views, literal
from persona_assets.stats import contrasts as estimates
from persona_assets.study import Study
from persona_assets.training import dataset

if TYPE_CHECKING:
    import duckdb

#: The evaluations, cells and baseline, and where each part of them comes from.
CELLS_SCHEMA = pl.Schema(
    dict.fromkeys(("cell", "source", "arm"), pl.String)
    | {"seed": pl.Int64}
    | dict.fromkeys(
        (
            *("origin", "checkpoint_source", "checkpoint_sha256"),
            *(
                "dataset_sha256",
                "reference_dataset_sha256",
                "outcomes_sha256",
                "checkpoint_run_id",
                "outcomes_run_id",
            ),
        ),
        pl.String,
    )
    | {"checkpoint_seconds": pl.Float64, "checkpoint_device": pl.String}
    | {"outcomes_seconds": pl.Float64, "outcomes_device": pl.String}
    | dict.fromkeys(("engine", "code_version", "study_sha256", "software"), pl.String)
)
#: What was checked of each landed partition: the table ``checks``.
CHECKS_SCHEMA = pl.Schema(
    dict.fromkeys(("asset", "partition", "check_name", "status"), pl.String)
    | {"blocking": pl.Boolean}
    | dict.fromkeys(("observed", "threshold", "remedy", "details", "run_id"), pl.String)
)

#: Tables that a study may have besides, and what tells their rows apart.
FURTHER_TABLES = {
    "checks": ("asset", "partition", "check_name"),
    "numbers": ("number_id",),
    "exploratory": ("number_id",),
    "lexicon": ("source", "word"),
    "vocabulary_scores": ("cell", "source", "persona", "scaffold", "question_id"),
    "vocabulary": ("number_id",),
}

_SHOWN, _NAMED = 5, 20
#: Of the build; what does not fit spills beside the file that is being built.
_MEMORY = "2GB"
#: Token-level columns of training rows stay in the landing files: nothing reads them by SQL.
_TOKEN_COLUMNS = ("input_ids", "loss_start")

#: Rows of ``table.column`` that must occur in ``other.column``; the baseline was not trained.
_REFERENCES = (
    ("outcomes", "cell", "cells", "cell", "true"),
    ("outcomes", "question_id", "questions", "question_id", "true"),
    ("training_rows", "cell", "cells", "cell", "true"),
    ("training_rows", "question_id", "questions", "question_id", "true"),
    ("cells", "cell", "outcomes", "cell", "true"),
    ("cells", "cell", "training_rows", "cell", f"cell <> '{outcome_rows.BASELINE}'"),
)


class WarehouseError(ValueError):
    """Landed files that cannot be one database: names the table, the rows and the remedy."""


@dataclass(frozen=True, slots=True)
class _Table:
    """One table: where its rows are, which columns it takes from them, and what tells rows apart.

    ``columns`` maps each column to the SQL expression over ``needs``, the files' columns, that
    makes it; the order of columns is never relied on.
    """

    name: str
    key: tuple[str, ...]
    files: tuple[Path, ...]
    needs: tuple[str, ...]
    columns: Mapping[str, str]


def build_warehouse(
    target: Path,
    study: Study,
    *,
    questions: Path,
    training: Sequence[Path],
    outcomes: Sequence[Path],
    cells: pl.DataFrame,
    contrasts: pl.DataFrame,
    equivalence: pl.DataFrame,
    losses: pl.DataFrame,
    more: Mapping[str, pl.DataFrame] | None = None,
    passing: bool = False,
    threads: int = 2,
) -> dict[str, int]:
    """Build the database and rename it to ``target``.

    Args:
        target: ``warehouse.duckdb``; replaced if it exists.
        study: The study; its file and hash become the table ``study``.
        questions: Parquet of the question bank (``bank.SCHEMA``).
        training: Parquet files of training rows (``training.dataset.SCHEMA``), one a cell; token
            ids are left out, ``cell`` is added.
        outcomes: Parquet files of outcome rows (``evaluation.outcomes.SCHEMA``), the baseline's
            among them. ``letter_logprobs`` becomes a MAP from letter to nats.
        cells: ``CELLS_SCHEMA``: one row a cell and one of the baseline.
        contrasts: ``CONTRASTS_SCHEMA``.
        equivalence: ``EQUIVALENCE_SCHEMA``.
        losses: ``LOSSES_SCHEMA``.
        more: Further tables by name, among :data:`FURTHER_TABLES`.
        passing: Leave out what no number is made of and most of the file is made of: in
            ``outcomes`` the texts and log-probabilities are NULL.
        threads: Threads of the build.

    Returns:
        Row count of every table.

    Raises:
        WarehouseError: a column is absent or nowhere described, a row is repeated or lacks its
            key, rows refer to cells or questions that are not there, or a cell has no outcomes or
            no training rows.
        OSError: the target's folder cannot be written.
    """
    import duckdb

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        scratch = Path(folder)
        frames = {
            "study": _study_frame(study, questions),
            "cells": cells,
            "contrasts": contrasts.select(estimates.CONTRASTS_SCHEMA.names()),
            "equivalence": equivalence.select(estimates.EQUIVALENCE_SCHEMA.names()),
            "losses": losses.select(estimates.LOSSES_SCHEMA.names()),
            **(more or {}),
        }
        for name, frame in frames.items():
            frame.write_parquet(scratch / f"{name}.parquet")
        tables = [
            *_landed_tables(questions, training, outcomes, passing),
            *(_frame_table(scratch / f"{name}.parquet") for name in frames),
        ]
        built = scratch / "built.duckdb"
        config = {
            "threads": threads,
            "memory_limit": _MEMORY,
            "temp_directory": str(scratch / "spill"),
        }
        with duckdb.connect(str(built), config=config) as db:
            counts = {table.name: _load(db, table) for table in tables}
            _check_references(db)
            create_views(db, COLUMNS)
            db.execute("CHECKPOINT")
        os.replace(built, target)
    return counts


def _study_frame(study: Study, questions: Path) -> pl.DataFrame:
    asked = bank.from_frame(pl.read_parquet(questions))
    return pl.DataFrame(
        {
            "study": [study.name],
            "title": [study.title],
            "study_sha256": [study.content_hash],
            "question_bank_sha256": [bank.content_hash(asked)],
            "definition": [json.dumps(study.content, ensure_ascii=False)],
        }
    )


def _landed_tables(
    questions: Path, training: Sequence[Path], outcomes: Sequence[Path], passing: bool
) -> Iterator[_Table]:
    yield _table("questions", ("question_id",), [questions], bank.SCHEMA)
    key = ("cell", "persona", "scaffold", "question_id")
    made = {"letter_logprobs": "map_from_entries(letter_logprobs)"}
    if passing:
        made = {"letter_logprobs": "NULL::MAP(VARCHAR, DOUBLE)", "rationale": "NULL::VARCHAR"}
    yield _table("outcomes", key, outcomes, outcome_rows.SCHEMA, made)
    kept = [name for name in dataset.SCHEMA if name not in _TOKEN_COLUMNS]
    cell = {"cell": "concat_ws('.', source, arm, seed)"}
    yield _table("training_rows", ("cell", "question_id"), training, kept, cell)


def _frame_table(file: Path) -> _Table:
    keys = {
        "study": ("study",),
        "cells": ("cell",),
        "contrasts": ("contrast", "axis", "scope", "scheme"),
        "equivalence": ("contrast", "axis", "scope", "scheme", "margin", "alpha"),
        "losses": ("arm", "scaffold", "axis", "scope"),
        **FURTHER_TABLES,
    }
    return _table(file.stem, keys[file.stem], [file], pl.read_parquet_schema(file))


def _table(
    name: str,
    key: tuple[str, ...],
    files: Sequence[Path],
    needs: Iterable[str],
    made: Mapping[str, str] | None = None,
) -> _Table:
    """A table of the columns ``needs`` as they are, but for those ``made`` by an expression."""
    needs = tuple(needs)
    columns = {column: _quoted(column) for column in needs} | (made or {})
    return _Table(name, key, tuple(files), needs, columns)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _load(db: duckdb.DuckDBPyConnection, table: _Table) -> int:
    """Create, check and describe one table; its row count."""
    _check_columns(table)
    select = ", ".join(f"{sql} AS {_quoted(name)}" for name, sql in table.columns.items())
    db.execute(
        # By name, whatever the order of columns in each file.
        f"CREATE TABLE {table.name} AS SELECT {select} "
        "FROM read_parquet($files, union_by_name = true)",
        {"files": [str(file) for file in table.files]},
    )
    _check_key(db, table)
    _describe(db, table)
    (count,) = db.execute(f"SELECT count(*) FROM {table.name}").fetchone()
    return count


def _check_columns(table: _Table) -> None:
    if not table.files:
        raise WarehouseError(f"{table.name}: there is no file. Land its partitions first.")
    for file in table.files:
        found = pl.read_parquet_schema(file)
        wanted = (*table.needs, *(key for key in table.key if key not in table.columns))
        if absent := [column for column in wanted if column not in found]:
            raise WarehouseError(
                f"{table.name}: {file} has no column {', '.join(absent)}. "
                "It was landed by other code: materialize its partition again."
            )


def _check_key(db: duckdb.DuckDBPyConnection, table: _Table) -> None:
    keys = ", ".join(table.key)
    for what, condition in (
        ("without a key", f"WHERE {' OR '.join(f'{k} IS NULL' for k in table.key)}"),
        ("repeated", f"GROUP BY {keys} HAVING count(*) > 1"),
    ):
        found = db.execute(
            f"SELECT count(*) OVER (), {keys} FROM {table.name} {condition} "
            f"ORDER BY {keys} LIMIT {_SHOWN}"
        ).fetchall()
        if found:
            shown = "; ".join(
                ", ".join(f"{k}={value}" for k, value in zip(table.key, row, strict=True))
                for _, *row in found
            )
            raise WarehouseError(
                f"{table.name}: {found[0][0]} row(s) {what}, first: {shown}. "
                "Pass each partition's file once, and materialize the named ones again."
            )


def _check_references(db: duckdb.DuckDBPyConnection) -> None:
    for table, column, other, key, where in _REFERENCES:
        found = db.execute(
            f"SELECT DISTINCT {column} FROM {table} WHERE {where} "
            f"AND {column} NOT IN (SELECT {key} FROM {other}) ORDER BY ALL"
        ).fetchall()
        if found:
            shown = ", ".join(str(value) for (value,) in found[:_SHOWN])
            raise WarehouseError(
                f"{table}.{column}: {len(found)} value(s) that {other} does not have, first: "
                f"{shown}. The two are of different states of the study: materialize both again."
            )


def _describe(db: duckdb.DuckDBPyConnection, table: _Table) -> None:
    comment = f"{TABLES[table.name]} Key: {', '.join(table.key)}."
    db.execute(f"COMMENT ON TABLE {table.name} IS {literal(comment)}")
    for column in table.columns:
        text = COLUMNS.get(f"{table.name}.{column}", COLUMNS.get(column))
        if text is None:
            raise WarehouseError(
                f"{table.name}.{column} is nowhere described: say what it means in "
                "persona_assets.reporting.comments.COLUMNS."
            )
        db.execute(f"COMMENT ON COLUMN {table.name}.{_quoted(column)} IS {literal(text)}")


def warehouse_audits(path: Path, study: Study) -> list[Audit]:
    """The audits of a built warehouse with its numbers, opened read-only.

    ``complete``, ``one_wrong_letter``, ``numbers_reproduced``.

    Raises:
        duckdb.Error: the warehouse cannot be read.
    """
    import duckdb

    with duckdb.connect(str(path), read_only=True) as db:
        return [_complete(db, study), _one_wrong_letter(db), _numbers_reproduced(db)]


def _complete(db: duckdb.DuckDBPyConnection, study: Study) -> Audit:
    """Every cell and the baseline, under every persona and scaffold, on every eval question."""
    ((n_rows, n_questions),) = db.execute(
        "SELECT (SELECT count(*) FROM outcomes), "
        "(SELECT count(*) FROM questions WHERE split = 'eval')"
    ).fetchall()
    evaluations = len(study.cells) + 1
    per_cell = len(study.personas) * len(study.scaffolds) * n_questions
    return audit(
        "complete",
        n_rows == evaluations * per_cell,
        observed=f"{n_rows} outcome rows",
        threshold=f"{evaluations} evaluations × {per_cell} rows = {evaluations * per_cell}",
        remedy="Materialize the evaluations that `persona-assets status` shows as not up to date.",
    )


def _numbers_reproduced(db: duckdb.DuckDBPyConnection) -> Audit:
    """Every number of the ledger comes out again from these very tables."""
    other = not_reproduced(db)
    (count,) = db.execute("SELECT count(*) FROM numbers").fetchone()
    return audit(
        "numbers_reproduced",
        not other,
        observed=f"{len(other)} fields of {count} numbers do not come out again",
        threshold="0 fields, to the last bit",
        remedy="Materialize number_ledger and warehouse again.",
        numbers=other[:_NAMED],
    )


def _one_wrong_letter(db: duckdb.DuckDBPyConnection) -> Audit:
    """A question has one wrong target letter over all arms, sources and seeds.

    The pairing of the contrasts rests on it: arms must differ in the rationale, not in the answer.
    """
    conflicts = rows(
        db,
        """
        SELECT min(question_id) AS question_id,
            list(DISTINCT target_letter ORDER BY target_letter) AS letters
        FROM training_rows WHERE target_letter <> correct_letter
        GROUP BY identity HAVING count(DISTINCT target_letter) > 1
        ORDER BY question_id
        """,
    )
    return audit(
        "one_wrong_letter",
        not conflicts,
        observed=f"{len(conflicts)} questions with more than one wrong target letter",
        threshold="0 questions over all arms, sources and seeds",
        remedy="Materialize the rationales and training datasets again, all from one study file.",
        questions=[
            f"{row['question_id']}: {', '.join(row['letters'])}" for row in conflicts[:_NAMED]
        ],
    )
