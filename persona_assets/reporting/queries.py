"""What the report reads from the warehouse, one function a question, each one SQL statement."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.stats.contrasts import MACRO
from persona_assets.study import Contrast, Study

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]


def rows(db: duckdb.DuckDBPyConnection, sql: str, **parameters: Any) -> list[Row]:
    """The rows of a query, each by column name."""
    result = db.execute(sql, parameters)
    names = [column[0] for column in result.description]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def provenance(db: duckdb.DuckDBPyConnection) -> Row:
    """Hashes and counts over the whole file, one row.

    ``trained_rows`` is the least and the greatest number of rows of a cell trained here, both
    None where there is no such cell.
    """
    (row,) = rows(
        db,
        """
        SELECT study_sha256, question_bank_sha256,
            (SELECT count(DISTINCT cell) FROM outcomes WHERE cell <> $baseline) AS n_cells,
            (SELECT count(*) FROM outcomes) AS n_outcomes,
            (SELECT count(*) FROM outcomes WHERE cell = $baseline) AS n_baseline,
            (SELECT count(*) FROM training_rows) AS n_training_rows,
            (SELECT count(DISTINCT question_id) FROM outcomes) AS n_questions,
            (SELECT [min(n), max(n)] FROM (
                SELECT count(*) AS n FROM training_rows WHERE NOT reference_only GROUP BY cell
            )) AS trained_rows,
            (SELECT count(DISTINCT run_id) FROM outcomes) AS n_runs,
            (SELECT count(DISTINCT checkpoint_sha256) FROM outcomes) AS n_checkpoints,
            (SELECT list(DISTINCT code_version ORDER BY code_version) FROM outcomes)
                AS code_versions
        FROM study
        """,
        baseline=BASELINE,
    )
    return row


def outcome_counts(db: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Outcome rows of each arm."""
    sql = "SELECT arm, count(*) AS n FROM outcomes WHERE arm IS NOT NULL GROUP BY arm"
    return {row["arm"]: row["n"] for row in rows(db, sql)}


def baseline_accuracy(db: duckdb.DuckDBPyConnection) -> dict[str, Row]:
    """The untrained model's accuracy by scaffold: over all personas, and its extremes.

    ``lowest_persona`` (the first by name) is None where all personas tie.
    """
    sql = """
        WITH by_persona AS (
            SELECT scaffold, persona, count(*) FILTER (is_correct) AS correct, count(*) AS n
            FROM outcomes WHERE cell = $baseline GROUP BY scaffold, persona
        )
        SELECT scaffold, sum(correct)::BIGINT AS correct, sum(n)::BIGINT AS n,
            sum(correct) / sum(n) AS accuracy,
            min(correct / n) AS lowest,
            CASE WHEN min(correct / n) < max(correct / n)
                 THEN arg_min(persona, (correct / n, persona)) END AS lowest_persona,
            max(correct / n) AS highest
        FROM by_persona GROUP BY scaffold
    """
    return {row["scaffold"]: row for row in rows(db, sql, baseline=BASELINE)}


def estimates(db: duckdb.DuckDBPyConnection, contrast: Contrast) -> dict[tuple[str, str], Row]:
    """One contrast's rows by (scope, scheme)."""
    found = rows(
        db,
        "SELECT * FROM contrasts WHERE contrast = $name AND axis = $axis",
        name=contrast.name,
        axis=contrast.axis,
    )
    return {(row["scope"], row["scheme"]): row for row in found}


def equivalence_tests(db: duckdb.DuckDBPyConnection, contrast: Contrast, scheme: str) -> list[Row]:
    """One contrast's equivalence tests under one scheme, narrowest margin first."""
    return rows(
        db,
        "SELECT * FROM equivalence WHERE contrast = $name AND axis = $axis AND scheme = $scheme "
        "ORDER BY margin, alpha",
        name=contrast.name,
        axis=contrast.axis,
        scheme=scheme,
    )


def seed_spread(db: duckdb.DuckDBPyConnection, study: Study, contrast: Contrast) -> float | None:
    """Standard deviation of the macro estimates of the single seeds; None for one seed.

    The intervals condition on the checkpoints: this stands beside them, for what they leave out.
    """
    by_seed = rows(
        db,
        """
        SELECT seed, (count(*) FILTER (is_correct AND arm = $b)
                      - count(*) FILTER (is_correct AND arm = $a))
                     / count(*) FILTER (arm = $a) AS estimate
        FROM outcomes
        WHERE scaffold = $scaffold AND arm IN ($a, $b) AND list_contains($sources, source)
            AND is_source = $is_source
        GROUP BY seed ORDER BY seed
        """,
        a=contrast.a,
        b=contrast.b,
        scaffold=study.inference.scaffold,
        sources=list(study.contrast_sources(contrast)),
        is_source=contrast.axis == "source_loss",
    )
    if len(by_seed) < 2:
        return None
    return statistics.stdev(row["estimate"] for row in by_seed)


def macro_losses(db: duckdb.DuckDBPyConnection) -> dict[tuple[str, str, str], Row]:
    """The loss matrix over all sources, by (axis, arm, scaffold)."""
    found = rows(db, "SELECT * FROM losses WHERE scope = $macro", macro=MACRO)
    return {(row["axis"], row["arm"], row["scaffold"]): row for row in found}


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


def cells(db: duckdb.DuckDBPyConnection) -> list[Row]:
    """The ``cells`` table, whatever its columns."""
    return rows(db, "SELECT * FROM cells")
