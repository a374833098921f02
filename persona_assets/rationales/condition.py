"""The rationales of one condition (source × arm): written, or constructed from the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.questions.bank import Question, wrong_letter
from persona_assets.rationales.arms import ARMS, Arm
from persona_assets.rationales.construct import Reference, garbage, reserved_words, scrambled
from persona_assets.rationales.words import lexicon_of
from persona_assets.rationales.writers import RationaleRequest, RationaleWriter, WrittenRationale
from persona_assets.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REFUSED, MAX_DROPPED = 0.05, 0.30

#: ``argues_for`` is null unless the rationale is written; ``reference_rationale`` is the
#: generic_cot rationale of the same question and source (null for no_cot, if it was refused, or if
#: it names another letter than it argues for: the generic_cot row is dropped then, too).
#: A dropped row (refused, without a reference to match, or naming another letter) enters no
#: dataset.
SCHEMA = pl.Schema(
    {
        "question_id": pl.String,
        "identity": pl.String,
        "correct_letter": pl.String,
        "target_letter": pl.String,
        "argues_for": pl.String,
        "rationale": pl.String,
        "reference_rationale": pl.String,
        "refused": pl.Boolean,
        "dropped": pl.Boolean,
    }
)

_IN_BRACKETS = re.compile(r"\(([A-E])\)")
_ALONE = re.compile(r"(?<!\w)[A-E](?!\w)")


def write_condition(
    study: Study,
    condition: str,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> tuple[pl.DataFrame, list[Audit]]:
    """The rationales of ``condition`` (``source.arm``) and what is to be said about them.

    Args:
        study: The study.
        condition: One of ``study.conditions``.
        questions: The whole bank: rows are written for its train questions, and filler avoids
            the words of all of them.
        tokenizer: The study's own; constructed arms are matched in its tokens.
        writer: Writes the rationales.

    Returns:
        A table with :data:`SCHEMA`, one row a train question in the bank's order, and the audits
        ``refusals``, ``drops`` (blocking) and ``letters_argued_for`` (a warning).

    Raises:
        KeyError: the study has no such condition.
    """
    if condition not in study.conditions:
        raise KeyError(
            f"study {study.name} has no condition {condition!r}; it has "
            f"{', '.join(study.conditions)}"
        )
    source, _, arm_name = condition.partition(".")
    arm = ARMS[arm_name]
    train = [q for q in questions if q.split == "train"]
    targets = [target_letter(arm, q, study.seed) for q in train]
    written: list[WrittenRationale | None] = [None] * len(train)
    if arm.has_rationale:
        requests = [RationaleRequest(q, wrong_letter(q, study.seed)) for q in train]
        written = list(writer.write(requests))
    references = [
        r.text if r and _is_usable(r, wrong_letter(q, study.seed)) else None
        for q, r in zip(train, written)
    ]
    if arm.is_constructed:
        texts = _constructed(study, source, arm, train, references, questions, tokenizer, writer)
        refused = [r is None or r.refused for r in written]
        dropped = [reference is None for reference in references]
    else:
        replies = _written(study, source, arm, train, writer)
        texts, refused = [r.text for r in replies], [r.refused for r in replies]
        dropped = [
            not _is_usable(r, _argues_for(arm, q, study.seed)) for q, r in zip(train, replies)
        ]
    frame = pl.DataFrame(
        [
            (q.id, q.identity, q.correct, target, _argues_for(arm, q, study.seed), *rest)
            for q, target, *rest in zip(train, targets, texts, references, refused, dropped)
        ],
        schema=SCHEMA,
        orient="row",
    )
    return frame, _audits(frame)


def target_letter(arm: Arm, question: Question, study_seed: int) -> str:
    """The letter that a row of ``arm`` ends in."""
    return question.correct if arm.target == "correct" else wrong_letter(question, study_seed)


def letters_named(rationale: str) -> set[str]:
    """The letters a rationale names: those in brackets, or, without any, those standing alone."""
    return set(_IN_BRACKETS.findall(rationale) or _ALONE.findall(rationale))


def filler_lexicon(
    study: Study,
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> frozenset[str]:
    """The words that filler must not hold: the bank's, the writer's, the personas', the frame's."""
    texts = [text for q in questions for text in (q.text, *q.choices)]
    words = lexicon_of([*texts, *study.personas.values(), " ".join(study.personas)])
    names = lexicon_of(name.replace("_", " ") for name in study.personas)
    return words | names | writer.vocabulary() | reserved_words(tokenizer)


def _argues_for(arm: Arm, question: Question, study_seed: int) -> str | None:
    if arm.rationale != "written":
        return None
    correct = arm.argues_for == "correct"
    return question.correct if correct else wrong_letter(question, study_seed)


def _is_usable(reply: WrittenRationale, argues_for: str | None) -> bool:
    """Not refused, and naming the letter that it argues for (if any) and no other."""
    return not reply.refused and (argues_for is None or letters_named(reply.text) == {argues_for})


def _written(
    study: Study, source: str, arm: Arm, train: Sequence[Question], writer: RationaleWriter
) -> Sequence[WrittenRationale]:
    if arm.rationale == "none":
        return [WrittenRationale("") for _ in train]
    voice = (source, study.personas[source]) if arm.voice == "persona" else (None, None)
    argued = [_argues_for(arm, q, study.seed) or "" for q in train]
    return writer.write([RationaleRequest(q, a, *voice) for q, a in zip(train, argued)])


def _constructed(
    study: Study,
    source: str,
    arm: Arm,
    train: Sequence[Question],
    references: Sequence[str | None],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> list[str]:
    """A text matched to each reference; empty where there is none."""
    matched = {
        i: Reference(q.identity, source, target_letter(arm, q, study.seed), text)
        for i, (q, text) in enumerate(zip(train, references))
        if text is not None
    }
    rows = list(matched.values())
    if arm.rationale == "garbage":
        lexicon = filler_lexicon(study, questions, tokenizer, writer)
        texts = garbage(tokenizer, rows, lexicon, study.seed)
    else:
        texts = scrambled(tokenizer, rows, study.seed)
    constructed = dict(zip(matched, texts))
    return [constructed.get(i, "") for i in range(len(train))]


def _audits(frame: pl.DataFrame) -> list[Audit]:
    rows = max(frame.height, 1)
    refused, dropped = int(frame["refused"].sum()), int(frame["dropped"].sum())
    wrong_letters = frame.filter(pl.col("dropped") & ~pl.col("refused"))
    return [
        audit(
            "refusals",
            refused <= MAX_REFUSED * rows,
            observed=f"{refused} of {frame.height} rationales refused",
            threshold=f"at most {MAX_REFUSED:.0%}",
            remedy="Choose another writer, or see why this one declines.",
            question_ids=frame.filter("refused")["question_id"].head(20).to_list(),
        ),
        audit(
            "drops",
            frame.height > 0 and dropped <= MAX_DROPPED * rows,
            observed=f"{dropped} of {frame.height} rows dropped",
            threshold=f"at most {MAX_DROPPED:.0%}",
            remedy="Choose another writer, or see why its rationales cannot be used.",
        ),
        audit(
            "letters_argued_for",
            wrong_letters.is_empty(),
            observed=f"{wrong_letters.height} rationales, or the references of constructed ones, "
            "do not name the letter they argue for",
            threshold="0 rationales; those that miss it are dropped",
            remedy="Have the writer name the letter it argues for, once, as (C).",
            blocking=False,
            question_ids=wrong_letters["question_id"].head(20).to_list(),
        ),
    ]
