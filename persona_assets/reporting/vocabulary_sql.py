"""The SQL that recomputes a vocabulary estimate from the table ``vocabulary_scores``.

The table holds ``stats.vocabulary.SCORES_SCHEMA``. Scores are integers: the sum is exact in any
order, and the one division is the estimator's own, to the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from persona_assets.stats.estimands import MACRO
from persona_assets.stats.vocabulary import SCALE, Quantity
from persona_assets.study import Study


def point_sql(study: Study, estimate: Mapping[str, Any]) -> str:
    """One row and column, ``value``: the estimate of a row of ``VOCABULARY_SCHEMA``."""
    value = f"sum(a.score - b.score)::BIGINT / (count(*) * {SCALE})"
    return f"SELECT {value} AS value\n{_compared(study, estimate)}"


def rows_sql(study: Study, estimate: Mapping[str, Any]) -> str:
    """One row a question: ``question_id`` and the integer ``value`` that is resampled."""
    return (
        "SELECT a.question_id, sum(a.score - b.score)::BIGINT AS value\n"
        f"{_compared(study, estimate)}\n"
        "GROUP BY a.question_id ORDER BY a.question_id"
    )


def _compared(study: Study, estimate: Mapping[str, Any]) -> str:
    """Every pair of scores that enters, ``a`` less ``b``: one persona, question and lexicon."""
    quantity = Quantity(*estimate["name"].split("-"))
    scope = estimate["scope"]
    sources = quantity.sources(study) if scope == MACRO else [scope]
    pairs = ", ".join(f"('{a}', '{b}')" for _, a, b in quantity.pairs(study, sources))
    person = "=" if estimate["axis"] == "source_loss" else "<>"
    return (
        f"FROM (VALUES {pairs}) AS pair(a, b)\n"
        "JOIN vocabulary_scores AS a ON a.cell = pair.a\n"
        "JOIN vocabulary_scores AS b ON b.cell = pair.b AND b.source = a.source\n"
        "    AND b.persona = a.persona AND b.scaffold = a.scaffold\n"
        "    AND b.question_id = a.question_id\n"
        f"WHERE a.scaffold = '{estimate['scaffold']}' AND a.persona {person} a.source"
    )
