"""What the report reads from the warehouse, one function a question, each one SQL statement."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_assets.evaluation.outcomes import BASELINE

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]


@contextmanager
def open_warehouse(path: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection to a warehouse that can neither write nor read any other file.

    Nor does it read the variables of the Python that calls it, fetch an extension, or keep beside
    the warehouse what does not fit into memory.
    """
    import duckdb

    config = {
        "enable_external_access": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
        "temp_directory": "",
        "lock_configuration": True,
    }
    with duckdb.connect(str(path), read_only=True, config=config) as db:
        yield db


def rows(db: duckdb.DuckDBPyConnection, sql: str, **parameters: Any) -> list[Row]:
    """The rows of a query, each by column name."""
    result = db.execute(sql, parameters)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def study_row(db: duckdb.DuckDBPyConnection) -> Row:
    """The table ``study``, less the file itself."""
    (row,) = rows(db, "SELECT * EXCLUDE (definition) FROM study")
    return row


def table(db: duckdb.DuckDBPyConnection, name: str, schema: pl.Schema) -> pl.DataFrame:
    """One of the tables of vocabulary leakage, as it was landed."""
    return pl.DataFrame(rows(db, f"SELECT * FROM {name}"), schema=schema, orient="row")


def sample_training_rows(db: duckdb.DuckDBPyConnection, seed: int) -> list[Row]:
    """One question's training row in every arm that kept it, of the source that has most arms.

    The choice is by rule: most arms, then first by name or id.
    """
    return rows(
        db,
        """
        WITH of_seed AS (SELECT * FROM training_rows WHERE seed = $seed),
        source AS (
            SELECT source FROM of_seed GROUP BY source
            ORDER BY count(DISTINCT arm) DESC, source LIMIT 1
        ),
        question AS (
            SELECT question_id FROM of_seed SEMI JOIN source USING (source) GROUP BY question_id
            ORDER BY count(DISTINCT arm) DESC, question_id LIMIT 1
        )
        SELECT * FROM of_seed SEMI JOIN source USING (source) SEMI JOIN question USING (question_id)
        """,
        seed=seed,
    )


def sample_outcomes(
    db: duckdb.DuckDBPyConnection, *, persona: str, seed: int, scaffold: str
) -> list[Row]:
    """The evaluation question first by id, asked under ``persona``: the baseline and own cells."""
    return rows(
        db,
        """
        SELECT o.*, q.text, q.choices FROM outcomes o JOIN questions q USING (question_id)
        WHERE o.persona = $persona AND o.scaffold = $scaffold
            AND (o.cell = $baseline OR (o.source = $persona AND o.seed = $seed))
            AND o.question_id = (
                SELECT min(question_id) FROM outcomes WHERE cell = $baseline
            )
        """,
        persona=persona,
        seed=seed,
        scaffold=scaffold,
        baseline=BASELINE,
    )


def checks(db: duckdb.DuckDBPyConnection) -> list[Row]:
    """The ``checks`` table, in the order of the asset graph and of the grid."""
    return rows(db, "SELECT * FROM checks ORDER BY rowid")


def cells(db: duckdb.DuckDBPyConnection) -> list[Row]:
    """The ``cells`` table, the baseline first."""
    return rows(db, "SELECT * FROM cells ORDER BY rowid")
