"""Views of the warehouse: the questions that are asked of it most, as SQL that can be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class View:
    """A view: what it answers, its query, and what the columns mean that no table has.

    ``stored`` ones are tables made by that query, because many numbers read them; their rows have
    an order, or the same study would give another file.
    """

    comment: str
    sql: str
    columns: dict[str, str]
    stored: bool = False


VIEWS: dict[str, View] = {
    "question_losses": View(
        "Loss of every cell on every question, by axis: what all contrasts are made from.",
        """
        SELECT o.cell, o.source, o.arm, o.seed, o.scaffold,
            if(o.is_source, 'source_loss', 'bystander_leakage') AS axis, o.question_id,
            sum(b.is_correct::INT - o.is_correct::INT)::BIGINT AS loss,
            count(*) AS n_personas
        FROM outcomes o JOIN outcomes b USING (persona, scaffold, question_id)
        WHERE b.cell = 'baseline' AND o.cell <> 'baseline'
        GROUP BY ALL
        -- What one number reads lies together, and the rest is skipped.
        ORDER BY axis, scaffold, arm, source, seed, question_id
        """,
        {
            "loss": "Baseline's right answers minus the cell's, summed over the axis' personas.",
            "n_personas": "Personas that it is summed over: 1 under source_loss, else bystanders.",
        },
        stored=True,
    ),
    "accuracies": View(
        "Right answers of every evaluation, by persona and scaffold.",
        """
        SELECT cell, source, arm, seed, persona, is_source, scaffold,
            count(*) FILTER (is_correct) AS correct, count(*) AS n,
            count(*) FILTER (is_correct) / count(*) AS accuracy
        FROM outcomes GROUP BY ALL
        """,
        {"correct": "Right answers.", "n": "Answers.", "accuracy": "correct / n."},
    ),
    "predicted_letters": View(
        "How often each letter was answered, by evaluation, persona and scaffold.",
        """
        SELECT *, n / sum(n) OVER (PARTITION BY cell, persona, scaffold) AS share
        FROM (
            SELECT cell, source, arm, seed, persona, scaffold, predicted_letter, count(*) AS n
            FROM outcomes GROUP BY ALL
        )
        ORDER BY cell, persona, scaffold, predicted_letter
        """,
        {"n": "Answers.", "share": "Of the answers of that cell, persona and scaffold."},
        stored=True,
    ),
    "stop_reasons": View(
        "How generated rationales ended, by evaluation, persona and scaffold.",
        """
        SELECT cell, source, arm, seed, persona, scaffold, stop_reason, count(*) AS n,
            sum(rationale_tokens)::BIGINT AS tokens
        FROM outcomes WHERE stop_reason IS NOT NULL GROUP BY ALL
        ORDER BY cell, persona, scaffold, stop_reason
        """,
        {"n": "Rationales.", "tokens": "Tokens of all of them."},
        stored=True,
    ),
    "answers": View(
        "Every answer beside the untrained model's to the same prompt, with the question.",
        """
        SELECT o.cell, o.source, o.arm, o.seed, o.persona, o.is_source, o.scaffold, o.question_id,
            q.text, q.choices, o.correct_letter, o.predicted_letter, o.is_correct,
            b.predicted_letter AS baseline_letter, b.is_correct AS baseline_correct,
            o.rationale, b.rationale AS baseline_rationale
        FROM outcomes o
        JOIN outcomes b USING (persona, scaffold, question_id)
        JOIN questions q USING (question_id)
        WHERE b.cell = 'baseline' AND o.cell <> 'baseline'
        """,
        {
            "baseline_letter": "The untrained model's answer.",
            "baseline_correct": "Whether it is the correct one.",
            "baseline_rationale": "What the untrained model wrote, or was given.",
        },
    ),
}


def create_views(db: duckdb.DuckDBPyConnection, described: dict[str, str]) -> None:
    """Create and describe the views; ``described`` says what the tables' columns mean.

    Raises:
        KeyError: a view's column is described nowhere.
    """
    for name, view in VIEWS.items():
        kind = "TABLE" if view.stored else "VIEW"
        db.execute(f"CREATE {kind} {name} AS {view.sql}")
        db.execute(f"COMMENT ON {kind} {name} IS {literal(view.comment)}")
        for column, *_ in db.execute(f"DESCRIBE {name}").fetchall():
            text = view.columns.get(column) or described[column]
            db.execute(f"COMMENT ON COLUMN {name}.{column} IS {literal(text)}")


def literal(text: str) -> str:
    """``text`` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
