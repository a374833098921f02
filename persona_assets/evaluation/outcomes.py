"""Outcome rows, one a cell × persona × scaffold × question: their schema, version and audits."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.hashing import sha256_text
from persona_assets.study import Cell
from persona_assets.study_rules import BASELINE

#: Above this share of rationales cut off at the token limit, the cut itself moves the answers.
MAX_TRUNCATED = 0.05

#: What an evaluation measures (``protocol.evaluate``), before it is told which cell it was.
MEASURED = pl.Schema(
    {
        "persona": pl.String,
        "scaffold": pl.String,
        "question_id": pl.String,
        "correct_letter": pl.String,
        "predicted_letter": pl.String,
        "is_correct": pl.Boolean,
        "letter_logprobs": pl.List(pl.Struct({"key": pl.String, "value": pl.Float64})),
        "rationale": pl.String,
        "rationale_tokens": pl.Int64,
        "stop_reason": pl.String,
        "truncated": pl.Boolean,
        "prompt_sha256": pl.String,
    }
)

#: The ``outcomes`` table. ``source``, ``arm``, ``seed``, ``origin`` and ``is_source`` are null for
#: the baseline; ``rationale`` is what stands in the scaffold's tag, generated or forced, and else
#: empty; ``stop_reason`` is null and ``truncated`` false where nothing is generated.
#: ``letter_logprobs`` are the entries of a map from letter to nats (DuckDB: ``map_from_entries``).
SCHEMA = pl.Schema(
    {
        "study": pl.String,
        "cell": pl.String,
        "source": pl.String,
        "arm": pl.String,
        "seed": pl.Int64,
        "origin": pl.String,
        "persona": pl.String,
        "is_source": pl.Boolean,
        **{name: dtype for name, dtype in MEASURED.items() if name != "persona"},
        "run_id": pl.String,
        "checkpoint_sha256": pl.String,
        "code_version": pl.String,
    }
)

_ROW = ["persona", "scaffold", "question_id"]


def outcome_table(
    measured: pl.DataFrame,
    *,
    study: str,
    cell: Cell | None,
    run_id: str,
    checkpoint_sha256: str | None,
    code_version: str,
) -> pl.DataFrame:
    """The outcome rows of one cell, or of the baseline (``cell`` None, no checkpoint).

    Args:
        measured: What was measured (columns ``MEASURED``), row order kept.
        study: The study's name.
        cell: The cell; None for the untrained model.
        run_id: The run that evaluated it.
        checkpoint_sha256: Content hash of the checkpoint; None for the untrained model.
        code_version: Version of the evaluation code.

    Raises:
        ValueError: a cell without a checkpoint's hash, or a baseline with one.
    """
    if (cell is None) != (checkpoint_sha256 is None):
        raise ValueError(
            f"cell {cell.key if cell else BASELINE} with checkpoint_sha256 {checkpoint_sha256}: "
            "every cell has a checkpoint, and the baseline has none"
        )
    constants = {
        "study": study,
        "cell": cell.key if cell else BASELINE,
        "source": cell and cell.source,
        "arm": cell and cell.arm,
        "seed": cell and cell.seed,
        "origin": cell and cell.origin,
        "run_id": run_id,
        "checkpoint_sha256": checkpoint_sha256,
        "code_version": code_version,
    }
    return measured.with_columns(
        *(pl.lit(value, SCHEMA[name]).alias(name) for name, value in constants.items()),
        (pl.col("persona") == pl.lit(cell and cell.source, pl.String)).alias("is_source"),
    ).select(SCHEMA.names())


def outcomes_data_version(frame: pl.DataFrame) -> str:
    """Content hash of outcome rows, in order, whichever run made them (``run_id`` left out).

    A re-run that finds the same values, to the last bit, has the same version.
    """
    return sha256_text(frame.drop("run_id").write_ndjson())


def coverage_audit(
    frame: pl.DataFrame,
    study_personas: Iterable[str],
    scaffolds: Iterable[str],
    question_ids: Iterable[str],
) -> Audit:
    """Whether one cell's rows are exactly personas × scaffolds × questions, each once."""
    grid = set(itertools.product(study_personas, scaffolds, question_ids))
    rows = frame.select(_ROW).rows()
    found = set(rows)
    missing, unknown = sorted(grid - found), sorted(found - grid)
    repeated = len(rows) - len(found)
    return audit(
        "coverage",
        not (missing or unknown or repeated),
        observed=f"{len(rows)} rows: {len(missing)} missing, {repeated} repeated, "
        f"{len(unknown)} not of the grid",
        threshold=f"exactly the {len(grid)} rows of the grid",
        remedy="Evaluate the cell again with the study's personas, scaffolds and question bank.",
        missing=_names(missing),
        repeated=_names(sorted(row for row, n in Counter(rows).items() if n > 1)),
        unknown=_names(unknown),
    )


def reachability_audit(frame: pl.DataFrame) -> Audit:
    """Whether each question's correct letter is among the letters that were scored.

    22 ARC questions are labelled 1 to 4, others have 3 or 5 choices; a letter reader that knew A
    to D only once made such questions impossible to answer.
    """
    scored = pl.col("letter_logprobs").list.eval(pl.element().struct.field("key"))
    unreachable = frame.filter(~scored.list.contains(pl.col("correct_letter")).fill_null(False))
    questions = unreachable["question_id"].unique(maintain_order=True).to_list()
    return audit(
        "reachability",
        not questions,
        observed=f"{len(questions)} question(s) whose correct letter was not scored",
        threshold="0 questions",
        remedy="Check the bank's normalised labels and the engine's letters.",
        questions=questions[:20],
    )


def truncation_audit(frame: pl.DataFrame) -> Audit:
    """Share of generated rationales cut off at the token limit, worst persona × scaffold first.

    A warning: a rationale closed by force can swing the answer.
    """
    shares = (
        frame.filter(pl.col("stop_reason").is_not_null())
        .group_by("persona", "scaffold", maintain_order=True)
        .agg(pl.col("truncated").mean().alias("share"))
        .sort("share", descending=True, maintain_order=True)
    )
    persona, scaffold, worst = shares.row(0) if shares.height else ("none", "none", 0.0)
    return audit(
        "truncation",
        worst <= MAX_TRUNCATED,
        observed=f"at most {worst:.1%} of a persona × scaffold's rationales ({persona}/{scaffold})",
        threshold=f"at most {MAX_TRUNCATED:.0%}",
        remedy="Raise evaluation.max_rationale_tokens, or read these rows with care.",
        blocking=False,
        shares={f"{p}/{s}": share for p, s, share in shares.rows()},
    )


def _names(rows: Sequence[tuple[str, str, str]], limit: int = 20) -> list[str]:
    return ["/".join(row) for row in rows[:limit]]
