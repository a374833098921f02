"""What is asked of a training dataset, row by row, with the observed value beside the threshold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from persona_assets.audit import Audit, audit
from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.protocol import letter_token_ids
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import LETTERS, Question
from persona_assets.rationales.arms import ARMS, Arm
from persona_assets.rationales.condition import target_letter
from persona_assets.rationales.construct import TOLERANCE, garbage_faults, sentences
from persona_assets.study import Cell, Study

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Written arms: the mean's distance from the reference arm's mean, as a share of it.
WRITTEN_TOLERANCE = 0.20
#: Letters are drawn by a hash: a fair draw fails this once in a thousand studies.
MIN_BALANCE_P = 0.001


def audit_dataset(
    frame: pl.DataFrame,
    study: Study,
    cell: Cell,
    questions: Sequence[Question],
    *,
    rationales: pl.DataFrame,
    tokenizer: PreTrainedTokenizerBase,
    lexicon: frozenset[str] = frozenset(),
) -> list[Audit]:
    """Everything that is asked of a cell's dataset.

    Args:
        frame: The dataset (``training.dataset.SCHEMA``).
        study: The study.
        cell: The cell.
        questions: The whole bank, both splits.
        rationales: The condition's rationales.
        tokenizer: The study's own.
        lexicon: The words that filler must not hold (``rationales.condition.filler_lexicon``);
            read for garbage arms only.

    Returns:
        ``loss_token_parity`` (arms with a rationale), ``letter_balance``, ``answer_suffix``,
        ``encoding``, ``target_letters``, ``wrong_letter_identity``, ``train_eval_disjoint``,
        and ``garbage_words`` or ``scrambled_words`` for the arm that it concerns.
    """
    arm = ARMS[cell.arm]
    bank = {q.id: q for q in questions}
    audits = [
        _letter_balance(frame, arm, bank),
        _answer_suffix(frame),
        _encoding(frame, tokenizer),
        _target_letters(frame, arm),
        _wrong_letter_identity(frame, arm, study, bank),
        _train_eval_disjoint(frame, questions),
    ]
    if arm.has_rationale:
        audits.insert(0, _loss_token_parity(frame, arm))
    if arm.rationale == "garbage":
        audits.append(_garbage_words(frame, arm, lexicon))
    if arm.rationale == "scrambled":
        audits.append(_scrambled_words(frame, arm, rationales))
    return audits


def _loss_token_parity(frame: pl.DataFrame, arm: Arm) -> Audit:
    rows = frame.filter(pl.col("reference_loss_tokens").is_not_null()).with_columns(
        difference=pl.col("loss_tokens") - pl.col("reference_loss_tokens")
    )
    if rows.is_empty():
        found = (False, "no row has a reference row", "reference rows to compare with", {})
    elif arm.is_constructed:
        found = _row_parity(rows)
    else:
        found = _mean_parity(rows)
    ok, observed, threshold, details = found
    result = audit(
        "loss_token_parity",
        ok,
        observed=observed,
        threshold=threshold,
        remedy="Materialize the condition's rationales again, with this study's tokenizer.",
        **details,
    )
    if frame["reference_only"].any():
        observed = f"{observed}; not what this checkpoint saw"
        return replace(result, status="unverifiable", observed=observed)
    return result


def _row_parity(rows: pl.DataFrame) -> tuple[bool, str, str, dict]:
    worst = rows.sort(pl.col("difference").abs(), descending=True).row(0, named=True)
    shown = ("question_id", "loss_tokens", "reference_loss_tokens", "difference")
    off = abs(worst["difference"])
    return (
        off <= TOLERANCE,
        f"at most {off} loss tokens from the reference row (question {worst['question_id']})",
        f"at most {TOLERANCE} loss tokens in any row",
        {"worst_row": {name: worst[name] for name in shown}},
    )


def _mean_parity(rows: pl.DataFrame) -> tuple[bool, str, str, dict]:
    mean, reference = (
        float(rows[c].cast(pl.Int64).sum()) / rows.height
        for c in ("loss_tokens", "reference_loss_tokens")
    )
    share = mean / reference - 1
    return (
        abs(share) <= WRITTEN_TOLERANCE,
        f"mean {mean:.2f} loss tokens, {share:+.1%} of the reference arm's {reference:.2f}",
        f"within ±{WRITTEN_TOLERANCE:.0%} of the reference arm's mean",
        {},
    )


def _letter_balance(frame: pl.DataFrame, arm: Arm, bank: Mapping[str, Question]) -> Audit:
    """Each target is one draw from its question's own letters, uniform (wrong: less the correct).

    The statistic is d' C⁺ d with d = counts − expected and C = Σ (diag p − p p'), the draws'
    covariance (Wald test; χ² with rank C degrees of freedom): questions differ in their letters,
    so Pearson's denominators would be wrong.
    """
    from scipy.special import chdtrc  # the χ² survival function; slow to import

    rows = [bank[name] for name in frame["question_id"] if name in bank]
    chances = np.array([_chances(q, arm) for q in rows]).reshape(-1, len(LETTERS))
    counts = Counter(frame["target_letter"])
    expected = chances.sum(axis=0)
    covariance = np.diag(expected) - chances.T @ chances
    distance = np.array([counts[letter] for letter in LETTERS]) - expected
    statistic = float(distance @ np.linalg.pinv(covariance, hermitian=True) @ distance)
    freedom = int(np.linalg.matrix_rank(covariance, hermitian=True))
    p = float(chdtrc(freedom, statistic)) if freedom else 1.0
    seen = ", ".join(
        f"{letter} {counts[letter]} of {e:.1f} expected"
        for letter, e in zip(LETTERS, expected)
        if e > 0 or counts[letter]
    )
    return audit(
        "letter_balance",
        p > MIN_BALANCE_P,
        observed=f"{seen}; p = {p:.2g}",
        threshold=f"p > {MIN_BALANCE_P} (χ² on {freedom} degrees of freedom)",
        remedy="Look for questions that were dropped by letter, or relabelled.",
        counts={letter: counts[letter] for letter in LETTERS},
    )


def _chances(question: Question, arm: Arm) -> list[float]:
    possible = set(question.letters) - ({question.correct} if arm.target == "wrong" else set())
    return [(letter in possible) / len(possible) for letter in LETTERS]


def _answer_suffix(frame: pl.DataFrame) -> Audit:
    ends = frame["assistant"].str.split("\n").list.last()
    bad = frame.filter(ends != (f"{ANCHOR} " + frame["target_letter"]))
    return _rows_audit(
        "answer_suffix",
        bad,
        "do not end in the target letter's answer line",
        "Rebuild the dataset; a writer must not append to the turn.",
    )


def _encoding(frame: pl.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Audit:
    """Ids are the prompt's, then, under the loss, the turn's, which end in letter and end of turn.

    Prompt and turn are encoded apart here, and the last two ids looked up one by one: rows are
    encoded whole, by other code, when the dataset is built.
    """
    letters = letter_token_ids(tokenizer, "".join(sorted(set(frame["target_letter"]))))
    chats = frame.select("system", "user").rows()
    prompts = encode(tokenizer, [chat_prompt(tokenizer, *chat) for chat in chats])
    turns = encode(tokenizer, [turn + tokenizer.eos_token for turn in frame["assistant"]])
    stored = frame.select("input_ids", "loss_start", "loss_tokens", "target_letter").rows()
    sound = [
        (ids[:start], ids[start:]) == (prompt, turn)
        and loss_tokens == len(turn)
        and ids[-2:] == [letters[letter], tokenizer.eos_token_id]
        for (ids, start, loss_tokens, letter), prompt, turn in zip(stored, prompts, turns)
    ]
    return _rows_audit(
        "encoding",
        frame.filter(~pl.Series(sound, dtype=pl.Boolean)),
        "have ids or a loss mask that are not those of prompt, turn, letter and end of turn",
        "Rebuild the dataset with the study's tokenizer.",
    )


def _target_letters(frame: pl.DataFrame, arm: Arm) -> Audit:
    is_correct = pl.col("target_letter") == pl.col("correct_letter")
    wrong_arm = arm.target == "wrong"
    bad = frame.filter(is_correct if wrong_arm else ~is_correct)
    return _rows_audit(
        "target_letters",
        bad,
        f"have {'the correct' if wrong_arm else 'a wrong'} letter as target",
        "Materialize the condition's rationales again.",
    )


def _wrong_letter_identity(
    frame: pl.DataFrame, arm: Arm, study: Study, bank: Mapping[str, Question]
) -> Audit:
    """Rows on the wrong side of the correct letter are the business of ``target_letters``."""
    agree = (pl.col("target_letter") == pl.col("correct_letter")) == (arm.target == "correct")
    rows = frame.filter(agree)
    prescribed = [
        target_letter(arm, bank[name], study.seed) if name in bank else None
        for name in rows["question_id"]
    ]
    expected = pl.Series(prescribed, dtype=pl.String)
    bad = rows.filter(rows["target_letter"].ne_missing(expected))
    return audit(
        "wrong_letter_identity",
        bad.is_empty(),
        observed=f"{bad.height} of {rows.height} targets are not the question's prescribed letter",
        threshold="0 targets: a question's wrong letter is one for all arms, sources and seeds",
        remedy="Rebuild the dataset: the contrasts' pairing rests on one wrong letter.",
        question_ids=bad["question_id"].head(20).to_list(),
    )


def _train_eval_disjoint(frame: pl.DataFrame, questions: Sequence[Question]) -> Audit:
    evaluated = [q.identity for q in questions if q.split == "eval"]
    return _rows_audit(
        "train_eval_disjoint",
        frame.filter(pl.col("identity").is_in(evaluated)),
        "are of questions in the eval split",
        "Remove the shared questions from the train split.",
    )


def _garbage_words(frame: pl.DataFrame, arm: Arm, lexicon: frozenset[str]) -> Audit:
    if not lexicon:
        raise ValueError("garbage rows need the lexicon that their filler must avoid")
    faults = {
        name: found
        for name, turn in frame.select("question_id", "assistant").rows()
        if (found := garbage_faults(_rationale_of(arm, turn), lexicon))
    }
    return _rows_audit(
        "garbage_words",
        frame.filter(pl.col("question_id").is_in(list(faults))),
        "hold a word of the lexicon, a lone letter or an odd character",
        "Materialize the condition's rationales again.",
        faults=dict(list(faults.items())[:20]),
    )


def _scrambled_words(frame: pl.DataFrame, arm: Arm, rationales: pl.DataFrame) -> Audit:
    references = dict(rationales.select("question_id", "reference_rationale").rows())
    bad = [
        name
        for name, turn in frame.select("question_id", "assistant").rows()
        if not _is_shuffled(_rationale_of(arm, turn), references.get(name) or "")
    ]
    return _rows_audit(
        "scrambled_words",
        frame.filter(pl.col("question_id").is_in(bad)),
        "are no reordering, sentence by sentence, of the reference rationale",
        "Materialize the condition's rationales again.",
    )


def _rationale_of(arm: Arm, turn: str) -> str:
    """The text inside the turn's tags."""
    return turn.removeprefix(arm.scaffold.opening).rsplit(f"\n</{arm.scaffold.tag}>", 1)[0]


def _is_shuffled(text: str, reference: str) -> bool:
    """Same words in each sentence, in another order wherever two of them differ."""
    ours, theirs = sentences(text), sentences(reference)
    return len(ours) == len(theirs) and all(
        Counter(a) == Counter(b) and end == other_end and (a != b or len(set(a)) < 2)
        for (a, end), (b, other_end) in zip(ours, theirs)
    )


def _rows_audit(name: str, bad: pl.DataFrame, what: str, remedy: str, **details: object) -> Audit:
    return audit(
        name,
        bad.is_empty(),
        observed=f"{bad.height} rows {what}",
        threshold="0 rows",
        remedy=remedy,
        question_ids=bad["question_id"].head(20).to_list(),
        **details,
    )
