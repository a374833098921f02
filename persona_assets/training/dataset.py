"""The training dataset of a cell: what its checkpoint sees, row by row, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from persona_assets.hashing import sha256_text
from persona_assets.questions.bank import Question, user_message, wrong_letter
from persona_assets.rationales.arms import ARMS, REFERENCE_ARM, assistant_turn, unscored
from persona_assets.study import Cell, Study
from persona_assets.training.encoding import ChatRow, count_turn_tokens, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Loss is taken on ``input_ids[loss_start:]``, ``loss_tokens`` of them; ``reference_loss_tokens``
#: are those of the generic_cot row of the same question and source, all of whose turn bears loss
#: (null where there is none).
#: ``reference_only`` marks the rows of a carried-over cell: how this study would have written
#: them, not what the checkpoint saw.
SCHEMA = pl.Schema(
    {
        "position": pl.Int32,
        "question_id": pl.String,
        "identity": pl.String,
        "source": pl.String,
        "arm": pl.String,
        "seed": pl.Int64,
        "system": pl.String,
        "user": pl.String,
        "assistant": pl.String,
        "correct_letter": pl.String,
        "target_letter": pl.String,
        "input_ids": pl.List(pl.Int32),
        "loss_start": pl.Int32,
        "loss_tokens": pl.Int32,
        "reference_loss_tokens": pl.Int32,
        "reference_only": pl.Boolean,
    }
)


#: Columns that say how a row came about, not what a checkpoint sees of it.
_BESIDE = ("reference_loss_tokens", "reference_only")


class DatasetError(ValueError):
    """Questions and rationales that do not belong together."""


def build_dataset(
    study: Study,
    cell: Cell,
    questions: Sequence[Question],
    rationales: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
) -> pl.DataFrame:
    """The rows of ``cell``, encoded, in the order that its seed gives them (:data:`SCHEMA`).

    Args:
        study: The study.
        cell: The cell.
        questions: The bank; its train questions are used.
        rationales: The condition's table (``rationales.condition.SCHEMA``); dropped rows are left
            out.
        tokenizer: The study's own.

    Raises:
        DatasetError: a rationale's question is not among the train questions, or none is left.
    """
    bank = {q.id: q for q in questions if q.split == "train"}
    kept = rationales.filter(pl.col("problem").is_null())
    unknown = [name for name in kept["question_id"] if name not in bank]
    if unknown:
        raise DatasetError(
            f"{cell.key}: the rationales of {cell.condition} hold question {unknown[0]!r}, which "
            "is no train question of the bank: materialize the rationales again"
        )
    if kept.is_empty():
        raise DatasetError(f"{cell.key}: the rationales of {cell.condition} hold no usable row")
    order = row_order(study.seed, cell.seed, rationales.height)
    place = {rationales["question_id"][int(i)]: rank for rank, i in enumerate(order)}
    rows = sorted(kept.iter_rows(named=True), key=lambda row: place[row["question_id"]])
    arm = study.arm(cell.arm)
    turns = [assistant_turn(arm, row["rationale"], row["target_letter"]) for row in rows]
    chats = [
        ChatRow(
            study.personas[cell.source],
            user_message(bank[row["question_id"]]),
            turn,
            unscored(arm, turn),
        )
        for row, turn in zip(rows, turns)
    ]
    encoded = encode_rows(tokenizer, chats)
    references = _reference_loss_tokens(study, bank, rows, tokenizer)
    return pl.DataFrame(
        {
            "position": range(len(rows)),
            "question_id": [row["question_id"] for row in rows],
            "identity": [row["identity"] for row in rows],
            "source": [cell.source] * len(rows),
            "arm": [cell.arm] * len(rows),
            "seed": [cell.seed] * len(rows),
            "system": [chat.system for chat in chats],
            "user": [chat.user for chat in chats],
            "assistant": [chat.assistant for chat in chats],
            "correct_letter": [row["correct_letter"] for row in rows],
            "target_letter": [row["target_letter"] for row in rows],
            "input_ids": [row.input_ids for row in encoded],
            "loss_start": [row.loss_start for row in encoded],
            "loss_tokens": [row.loss_tokens for row in encoded],
            "reference_loss_tokens": references,
            "reference_only": [cell.origin == "carry_over"] * len(rows),
        },
        schema=SCHEMA,
    )


def training_data_version(frame: pl.DataFrame) -> str:
    """Content hash of what a checkpoint is trained on.

    How long the reference arm's rows are is none of it: a reworded reference template stales the
    arms that are matched to it, and retrains only those whose own rows it changes.
    """
    return sha256_text(frame.drop(_BESIDE).write_ndjson())


def row_order(study_seed: int, cell_seed: int, n: int) -> np.ndarray:
    """A permutation of ``n`` rows: the same for every condition, another for every cell seed.

    Drawn before rows are dropped, so that a refused rationale moves no other row.
    """
    digest = sha256_text(f"row-order:{study_seed}:{cell_seed}")
    return np.random.Generator(np.random.PCG64(int(digest, 16))).permutation(n)


def _reference_loss_tokens(
    study: Study,
    bank: dict[str, Question],
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
) -> list[int | None]:
    arm = ARMS[REFERENCE_ARM]
    turns = {
        i: assistant_turn(
            arm, row["reference_rationale"], wrong_letter(bank[row["question_id"]], study.seed)
        )
        for i, row in enumerate(rows)
        if row["reference_rationale"] is not None
    }
    counts = dict(zip(turns, count_turn_tokens(tokenizer, list(turns.values()))))
    return [counts.get(i) for i in range(len(rows))]
