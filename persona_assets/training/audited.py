"""A dataset under audit: its rows, what they are held against, and what several audits look up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.chat import encode
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import Question
from persona_assets.rationales.arms import Arm
from persona_assets.rationales.writers import RationaleWriter
from persona_assets.study import Cell, Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Rows that an audit names at most.
SHOWN = 20
REWRITE = "Materialize the condition's rationales again."


@dataclass(frozen=True)
class AuditedDataset:
    """A cell's dataset and its context.

    Attributes:
        frame: The dataset (``training.dataset.SCHEMA``).
        study: The study.
        cell: The cell.
        questions: The whole bank, both splits.
        rationales: The condition's rationales.
        tokenizer: The study's own.
        writer: The study's, for the words that filler must not hold.
    """

    frame: pl.DataFrame
    study: Study
    cell: Cell
    questions: Sequence[Question]
    rationales: pl.DataFrame
    tokenizer: PreTrainedTokenizerBase
    writer: RationaleWriter

    @cached_property
    def arm(self) -> Arm:
        """The cell's arm."""
        return self.study.arm(self.cell.arm)

    @cached_property
    def bank(self) -> Mapping[str, Question]:
        """The questions by id."""
        return {q.id: q for q in self.questions}

    @cached_property
    def heads(self) -> list[str]:
        """Each turn without its answer: what stands above the last line that holds the anchor."""
        return [above_answer(turn) for turn in self.frame["assistant"]]

    @cached_property
    def texts(self) -> list[str]:
        """Each row's rationale, re-read from between the turn's tags."""
        scaffold = self.arm.scaffold
        closing = f"\n{scaffold.closing_tag}"
        return [head.removeprefix(scaffold.opening).removesuffix(closing) for head in self.heads]

    @cached_property
    def kept(self) -> Mapping[str, str]:
        """The rationales by question, but for those that are dropped."""
        kept = self.rationales.filter(pl.col("problem").is_null())
        return dict(kept.select("question_id", "rationale").iter_rows())

    @cached_property
    def references(self) -> list[str | None]:
        """Each row's reference rationale; None where there is none."""
        by_question = dict(self.rationales.select("question_id", "reference_rationale").iter_rows())
        return [by_question.get(name) for name in self.frame["question_id"]]

    @cached_property
    def turn_ids(self) -> list[list[int]]:
        """Each assistant's turn and its end, encoded here and now, without the prompt."""
        end = self.tokenizer.eos_token
        return encode(self.tokenizer, [turn + end for turn in self.frame["assistant"]])


def above_answer(turn: str) -> str:
    """``turn`` without its last line that holds the anchor, and what follows that."""
    before, anchor, _ = turn.rpartition(ANCHOR)
    return before.rpartition("\n")[0] if anchor else turn


def rows_audit(name: str, bad: pl.DataFrame, what: str, remedy: str, **details: Any) -> Audit:
    """An audit that no row fails; ``what`` goes on from "3 rows"."""
    return audit(
        name,
        bad.is_empty(),
        observed=f"{bad.height} rows {what}",
        threshold="0 rows",
        remedy=remedy,
        question_ids=bad["question_id"].head(SHOWN).to_list(),
        **details,
    )
