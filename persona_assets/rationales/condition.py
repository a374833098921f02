"""The rationales of one condition (source × arm): written, or constructed from the reference."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import Question, wrong_letter
from persona_assets.rationales.arms import Arm
from persona_assets.rationales.garbage import filler_lexicon
from persona_assets.rationales.matching import Batch, Reference
from persona_assets.rationales.methods import CONSTRUCTIONS
from persona_assets.rationales.writers import (
    RationaleRequest,
    RationaleWriter,
    WriterProblem,
    WrittenRationale,
)
from persona_assets.study import Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REFUSED, MAX_DROPPED = 0.05, 0.30

#: Why a row is dropped: the writer's reason, or a letter named that is not the one argued for. A
#: constructed row is dropped with the reference row that it would be matched to.
RowProblem = WriterProblem | Literal["wrong_letter"]

#: ``argues_for`` is null unless the rationale is written; ``reference_rationale`` is the
#: generic_cot rationale of the same question and source (null for no_cot, and where it cannot be
#: used, so that the generic_cot row is dropped). ``problem`` is null, or a :data:`RowProblem`: such
#: a row enters no dataset.
SCHEMA = pl.Schema(
    {
        "question_id": pl.String,
        "identity": pl.String,
        "correct_letter": pl.String,
        "target_letter": pl.String,
        "argues_for": pl.String,
        "rationale": pl.String,
        "reference_rationale": pl.String,
        "problem": pl.String,
    }
)

_IN_BRACKETS = re.compile(r"\(([A-Ea-e])\)")
#: Degrees (``20 °C``) are no choices.
_ALONE = re.compile(r"(?<![\w°])(?<!°\s)[B-E](?!\w)")
#: ``A`` is no article inside a sentence, without a word after it, or before one of these.
_ALONE_A = re.compile(
    r"(?<=[\w,] )A(?!\w)"
    r"|(?<!\w)A(?!\w|\s+[\"'“‘(]?\w)"
    r"|(?<!\w)A(?=\s+(?:is|was|has|does|or|and|nor|would|should|cannot|because|since|fits)\b)"
)
#: What would end the rationale, or the turn, early.
_FRAME = re.compile(rf"</?[\w-]*>|<\||{re.escape(ANCHOR)}")


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
    asked = [q for q in questions if q.split == "train"]
    frame = write_rows(study, source, study.arm(arm_name), asked, questions, tokenizer, writer)
    return frame, [_refusals(frame), _drops(frame), _letters_argued_for(frame)]


def write_rows(
    study: Study,
    persona: str,
    arm: Arm,
    asked: Sequence[Question],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> pl.DataFrame:
    """The arm's rationale for each question ``asked`` of ``persona``, with :data:`SCHEMA`.

    Args:
        persona: In whose voice persona-voiced rationales are, and whose filler is drawn.
        asked: The questions to write about.
        questions: The whole bank, whose words filler avoids.
    """
    wrong = [wrong_letter(q, study.seed) for q in asked]
    replies = [WrittenRationale("", "malformed")] * len(asked)
    if arm.has_rationale:
        replies = writer.write([RationaleRequest(q, w) for q, w in zip(asked, wrong)])
    problems = [_problem(reply, letter) for reply, letter in zip(replies, wrong)]
    references = [None if p else reply.text for p, reply in zip(problems, replies)]
    argues_for = [_argues_for(arm, q, study.seed) for q in asked]
    if arm.is_constructed:
        texts = _constructed(study, persona, arm, asked, references, questions, tokenizer, writer)
    else:
        written = _written(study, persona, arm, asked, argues_for, writer)
        texts = [reply.text for reply in written]
        problems = [_problem(reply, letter) for reply, letter in zip(written, argues_for)]
    return pl.DataFrame(
        {
            "question_id": [q.id for q in asked],
            "identity": [q.identity for q in asked],
            "correct_letter": [q.correct for q in asked],
            "target_letter": [target_letter(arm, q, study.seed) for q in asked],
            "argues_for": argues_for,
            "rationale": texts,
            "reference_rationale": references,
            "problem": problems,
        },
        schema=SCHEMA,
    )


def target_letter(arm: Arm, question: Question, study_seed: int) -> str:
    """The letter that a row of ``arm`` ends in."""
    return question.correct if arm.target == "correct" else wrong_letter(question, study_seed)


def letters_named(rationale: str) -> set[str]:
    """The letters a rationale names: in brackets, of either case, and capitals standing alone.

    An ``A`` that may be the article is none. A capital that is no choice (``vitamin C``) cannot be
    told from one that is: the row is dropped, which is the safe side.
    """
    named = [letter.upper() for letter in _IN_BRACKETS.findall(rationale)]
    return {*named, *_ALONE.findall(rationale), *_ALONE_A.findall(rationale)}


def condition_lexicon(
    study: Study,
    persona: str,
    arm: Arm,
    references: Sequence[str | None],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> frozenset[str]:
    """The words that filler for ``persona`` must not hold.

    English, the bank's words, those of the reference rationales that it is matched to, the
    persona's, the frame's, and what the writer knows beyond English. Other personas are not looked
    at: adding one must not change a row.
    """
    said = [text for text in references if text is not None]
    named = [persona.replace("_", " "), study.personas[persona]]
    return filler_lexicon(tokenizer, arm, questions, [*said, *named]) | writer.vocabulary()


def _argues_for(arm: Arm, question: Question, study_seed: int) -> str | None:
    if arm.rationale != "written":
        return None
    return question.correct if arm.argues_for == "correct" else wrong_letter(question, study_seed)


def _problem(reply: WrittenRationale, argues_for: str | None) -> RowProblem | None:
    """Why a reply cannot be used; None if it argues for its letter (if any) and no other."""
    if reply.problem or argues_for is None:
        return reply.problem
    if not reply.text.strip() or _FRAME.search(reply.text):
        return "malformed"
    return None if letters_named(reply.text) == {argues_for} else "wrong_letter"


def _written(
    study: Study,
    persona: str,
    arm: Arm,
    asked: Sequence[Question],
    argues_for: Sequence[str | None],
    writer: RationaleWriter,
) -> Sequence[WrittenRationale]:
    if not arm.has_rationale:
        return [WrittenRationale("") for _ in asked]
    voice = (persona, study.personas[persona]) if arm.voice == "persona" else (None, None)
    return writer.write([RationaleRequest(q, a or "", *voice) for q, a in zip(asked, argues_for)])


def _constructed(
    study: Study,
    persona: str,
    arm: Arm,
    asked: Sequence[Question],
    references: Sequence[str | None],
    questions: Sequence[Question],
    tokenizer: PreTrainedTokenizerBase,
    writer: RationaleWriter,
) -> list[str]:
    """A text matched to each reference; empty where there is none."""
    matched = {
        i: Reference(q.identity, persona, target_letter(arm, q, study.seed), text)
        for i, (q, text) in enumerate(zip(asked, references))
        if text is not None
    }
    lexicon = condition_lexicon(study, persona, arm, references, questions, tokenizer, writer)
    batch = Batch(arm, list(matched.values()), tokenizer, lexicon, study.seed)
    constructed = dict(zip(matched, CONSTRUCTIONS[arm.rationale](batch)))
    return [constructed.get(i, "") for i in range(len(asked))]


def _refusals(frame: pl.DataFrame) -> Audit:
    refused = frame.filter(pl.col("problem") == "refused")
    return audit(
        "refusals",
        refused.height <= MAX_REFUSED * frame.height,
        observed=f"{refused.height} of {frame.height} rationales refused",
        threshold=f"at most {MAX_REFUSED:.0%}",
        remedy="Choose another writer, or see why this one declines.",
        question_ids=refused["question_id"].head(20).to_list(),
    )


def _drops(frame: pl.DataFrame) -> Audit:
    dropped = frame["problem"].drop_nulls()
    reasons = dict(dropped.value_counts().sort("problem").rows())
    return audit(
        "drops",
        frame.height > 0 and dropped.len() <= MAX_DROPPED * frame.height,
        observed=f"{dropped.len()} of {frame.height} rows dropped",
        threshold=f"at most {MAX_DROPPED:.0%}",
        remedy="Choose another writer, or see why its rationales cannot be used.",
        reasons=reasons,
    )


def _letters_argued_for(frame: pl.DataFrame) -> Audit:
    wrong = frame.filter(pl.col("problem") == "wrong_letter")
    return audit(
        "letters_argued_for",
        wrong.is_empty(),
        observed=f"{wrong.height} rationales do not name the letter they argue for, or name others",
        threshold="0 rationales; those that miss it are dropped",
        remedy="Have the writer name the letter it argues for, once, as (C).",
        blocking=False,
        question_ids=wrong["question_id"].head(20).to_list(),
    )
