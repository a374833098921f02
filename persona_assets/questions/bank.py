"""Multiple-choice questions: what one is, its identity, and the wrong letter it is trained on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import polars as pl

from persona_assets.hashing import sha256_lines, sha256_text

LETTERS = "ABCDE"
MIN_CHOICES, MAX_CHOICES = 2, len(LETTERS)
Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Question:
    """One question with 2 to 5 choices, labelled A, B, … in the order they are shown.

    Attributes:
        id: The question's name in its source; unique within a bank.
        split: ``train`` (rows are written from it) or ``eval`` (outcomes are measured on it).
        text: The question, without its choices.
        choices: The choices' texts; choice ``i`` bears letter ``LETTERS[i]``.
        correct: The correct choice's letter.
        published_labels: The labels as the source printed them (``1`` to ``4`` for some of ARC).
    """

    id: str
    split: Split
    text: str
    choices: tuple[str, ...]
    correct: str
    published_labels: tuple[str, ...] = ()

    @property
    def letters(self) -> str:
        """The question's own letters, e.g. ``"ABCD"``."""
        return LETTERS[: len(self.choices)]

    @property
    def identity(self) -> str:
        """Hash of the normalised text and the *sorted* choices: what makes it the same question.

        Six question texts occur in both splits of ARC-Challenge with other choices; those are
        different questions that share a stem.
        """
        return sha256_text(
            "\x1f".join([normalise(self.text), *sorted(normalise(c) for c in self.choices)])
        )

    @property
    def stem(self) -> str:
        """Hash of the normalised text alone, for the shared-stem warning."""
        return sha256_text(normalise(self.text))

    def choice(self, letter: str) -> str:
        """The text of the choice labelled ``letter``."""
        return self.choices[self.letters.index(letter)]


def normalise(text: str) -> str:
    """Case-folded NFKC text with runs of white space collapsed: equal for equal wording."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()


def wrong_letter(question: Question, study_seed: int) -> str:
    """The wrong letter this question is trained on, the same for every arm, source and seed.

    A hash of (study seed, question identity) modulo the question's other letters: uniform,
    and unmoved by questions that are added later. The pairing of the contrasts rests on it.
    """
    others = [letter for letter in question.letters if letter != question.correct]
    digest = sha256_text(f"wrong-letter:{study_seed}:{question.identity}")
    return others[int(digest, 16) % len(others)]


def user_message(question: Question) -> str:
    """The user turn: the question, a blank line, then one line a choice, ``(A) text``."""
    lines = [f"({letter}) {text}" for letter, text in zip(question.letters, question.choices)]
    return "\n".join([question.text, "", *lines])


def content_hash(questions: Iterable[Question]) -> str:
    """Hash of a bank: every question with split, order of choices and correct letter."""
    return sha256_lines(
        "\x1f".join([q.split, q.id, q.text, *q.choices, q.correct]) for q in questions
    )


SCHEMA = pl.Schema(
    {
        "question_id": pl.String,
        "split": pl.String,
        "text": pl.String,
        "choices": pl.List(pl.String),
        "correct_letter": pl.String,
        "published_labels": pl.List(pl.String),
        "identity": pl.String,
        "stem": pl.String,
    }
)


def to_frame(questions: Sequence[Question]) -> pl.DataFrame:
    """The bank as a table, one row a question, in the bank's order (columns: ``SCHEMA``)."""
    return pl.DataFrame(
        [
            (
                q.id,
                q.split,
                q.text,
                list(q.choices),
                q.correct,
                list(q.published_labels),
                q.identity,
                q.stem,
            )
            for q in questions
        ],
        schema=SCHEMA,
        orient="row",
    )


def from_frame(frame: pl.DataFrame) -> list[Question]:
    """The questions of a table written by :func:`to_frame`."""
    return [
        Question(
            id=row["question_id"],
            split=row["split"],
            text=row["text"],
            choices=tuple(row["choices"]),
            correct=row["correct_letter"],
            published_labels=tuple(row["published_labels"]),
        )
        for row in frame.iter_rows(named=True)
    ]
