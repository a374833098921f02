"""What is asked of a training dataset: every audit, and which arms it concerns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import polars as pl

from persona_assets.audit import Audit
from persona_assets.questions.bank import Question
from persona_assets.rationales.arms import Arm
from persona_assets.rationales.writers import RationaleWriter
from persona_assets.study import Cell, Study
from persona_assets.training.audit_budget import loss_token_parity
from persona_assets.training.audit_prescription import rows_as_prescribed, rows_complete
from persona_assets.training.audit_rows import (
    answer_suffix,
    encoding,
    letter_balance,
    target_letters,
    train_eval_disjoint,
    wrong_letter_identity,
)
from persona_assets.training.audit_text import (
    argued_letter,
    byte_fallback,
    garbage_words,
    lexical_variety,
    scrambled_words,
)
from persona_assets.training.audited import AuditedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _any(arm: Arm) -> bool:
    return True


def _with_rationale(arm: Arm) -> bool:
    return arm.has_rationale


def _made_by(way: str) -> Callable[[Arm], bool]:
    return lambda arm: arm.rationale == way


#: Each audit, by the name of its check, and the arms that it concerns.
AUDITS: dict[str, tuple[Callable[[AuditedDataset], Audit], Callable[[Arm], bool]]] = {
    "rows_complete": (rows_complete, _any),
    "rows_as_prescribed": (rows_as_prescribed, _any),
    "loss_token_parity": (loss_token_parity, _with_rationale),
    "letter_balance": (letter_balance, _any),
    "answer_suffix": (answer_suffix, _any),
    "encoding": (encoding, _any),
    "target_letters": (target_letters, _any),
    "wrong_letter_identity": (wrong_letter_identity, _any),
    "train_eval_disjoint": (train_eval_disjoint, _any),
    "argued_letter": (argued_letter, _made_by("written")),
    "lexical_variety": (lexical_variety, _with_rationale),
    "byte_fallback": (byte_fallback, _any),
    "garbage_words": (garbage_words, _made_by("garbage")),
    "scrambled_words": (scrambled_words, _made_by("scrambled")),
}


def audit_dataset(
    frame: pl.DataFrame,
    study: Study,
    cell: Cell,
    questions: Sequence[Question],
    *,
    rationales: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> list[Audit]:
    """Everything that is asked of a cell's dataset, in the order of :data:`AUDITS`.

    Args:
        frame: The dataset (``training.dataset.SCHEMA``).
        study: The study.
        cell: The cell.
        questions: The whole bank, both splits.
        rationales: The condition's rationales.
        tokenizer: The study's own.
        writer: The study's, for the words that filler must not hold.

    Returns:
        The audits that concern the cell's arm.
    """
    dataset = AuditedDataset(frame, study, cell, questions, rationales, tokenizer, writer)
    return [look(dataset) for look, concerns in AUDITS.values() if concerns(dataset.arm)]
