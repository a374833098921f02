"""Audits of a dataset against what it is made from: study, bank and the condition's rationales.

Rows are held to them by question id; their answer line, target letter and ids are the business of
other audits (``audit_rows``).
"""

from __future__ import annotations

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.questions.bank import user_message
from persona_assets.rationales.arms import assistant_turn
from persona_assets.training.audited import SHOWN, AuditedDataset, above_answer, rows_audit
from persona_assets.training.dataset import row_order


def rows_complete(dataset: AuditedDataset) -> Audit:
    """Every kept rationale has one row, in the order that the cell's seed gives them."""
    frame, prescribed = dataset.frame, _prescribed_order(dataset)
    ids = pl.Series("question_id", prescribed, dtype=pl.String)
    rows = frame["question_id"]
    asked = pl.Series([q.id for q in dataset.questions if q.split == "train"], dtype=pl.String)
    faults = {
        "no rationale": _without(asked, dataset.rationales["question_id"]),
        "missing": _without(ids, rows),
        "foreign": _without(rows, ids),
        "repeated": rows.filter(rows.is_duplicated()).unique(maintain_order=True).to_list(),
    }
    in_order = rows.to_list() == prescribed
    counted = frame["position"].to_list() == list(range(frame.height))
    seen = [f"{len(names)} questions {fault}" for fault, names in faults.items()]
    seen.append("in the seed's order" if in_order else "not in the seed's order")
    seen.append("positions count up from 0" if counted else "positions do not count up from 0")
    return audit(
        "rows_complete",
        in_order and counted and not faults["no rationale"],
        observed=f"{frame.height} rows: {', '.join(seen)}",
        threshold=f"{len(prescribed)} rows: each kept rationale's, once, in the seed's order",
        remedy="Rebuild the dataset; where questions have no rationale, materialize those again.",
        question_ids={fault: names[:SHOWN] for fault, names in faults.items()},
    )


def _prescribed_order(dataset: AuditedDataset) -> list[str]:
    """The ids of the kept rationales as they are trained on."""
    names = dataset.rationales["question_id"]
    order = row_order(dataset.study.seed, dataset.cell.seed, len(names))
    return [name for name in names.gather(order) if name in dataset.kept]


def _without(these: pl.Series, those: pl.Series) -> list[str]:
    return these.filter(~these.is_in(those.to_list())).to_list()


def rows_as_prescribed(dataset: AuditedDataset) -> Audit:
    """Each row says what its cell, its question and its rationale make it say.

    Rows of questions without a rationale are the business of ``rows_complete``.
    """
    found = dataset.frame.with_columns(head=pl.Series(dataset.heads, dtype=pl.String))
    prescribed = _prescription(dataset)
    rows = found.join(prescribed, on="question_id", suffix=_ASKED, maintain_order="left")
    fields = [name for name in prescribed.columns if name != "question_id"]
    differs = [pl.col(name).ne_missing(pl.col(name + _ASKED)).alias(name) for name in fields]
    wrong = rows.select("question_id", *differs)
    differing = {name: wrong.filter(name)["question_id"].to_list() for name in fields}
    differing = {_SAID_OF.get(name, name): ids for name, ids in differing.items() if ids}
    return rows_audit(
        "rows_as_prescribed",
        wrong.filter(pl.any_horizontal(fields)),
        "differ from what study, bank and rationales prescribe"
        + "".join(f"; {name} in {len(ids)}" for name, ids in differing.items()),
        "Rebuild the dataset from the study's own questions and rationales.",
        differing={
            name: {"rows": len(ids), "question_ids": ids[:SHOWN]} for name, ids in differing.items()
        },
    )


_ASKED = " asked"
_SAID_OF = {"head": "tags or rationale"}


def _prescription(dataset: AuditedDataset) -> pl.DataFrame:
    """What a row must hold, by question: columns of the dataset's schema, and the turn's head."""
    cell, arm, bank = dataset.cell, dataset.arm, dataset.bank
    rows = [(bank[name], text) for name, text in dataset.kept.items() if name in bank]
    turns = [assistant_turn(arm, text, question.correct) for question, text in rows]
    return pl.DataFrame(
        {
            "question_id": [q.id for q, _ in rows],
            "identity": [q.identity for q, _ in rows],
            "correct_letter": [q.correct for q, _ in rows],
            "user": [user_message(q) for q, _ in rows],
            "head": [above_answer(turn) for turn in turns],
        },
        schema_overrides=dict.fromkeys(("question_id", "identity", "user", "head"), pl.String),
    ).with_columns(
        system=pl.lit(dataset.study.personas[cell.source]),
        source=pl.lit(cell.source),
        arm=pl.lit(cell.arm),
        seed=pl.lit(cell.seed, dtype=pl.Int64),
        reference_only=pl.lit(cell.origin == "carry_over"),
    )
