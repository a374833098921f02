"""Audits of a dataset's letters, ids and questions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import polars as pl

from persona_assets.audit import Audit, Distribution, audit
from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.protocol import letter_token_ids
from persona_assets.evaluation.scaffolds import ANCHOR
from persona_assets.questions.bank import LETTERS, Question
from persona_assets.rationales.arms import Arm
from persona_assets.rationales.condition import target_letter
from persona_assets.training.audited import REWRITE, SHOWN, AuditedDataset, rows_audit

#: Letters are drawn by a hash: a fair draw fails this once in a thousand studies.
MIN_BALANCE_P = 0.001


def letter_balance(dataset: AuditedDataset) -> Audit:
    """Each target is one draw from its question's own letters, uniform (wrong: less the correct).

    The statistic is d' C⁺ d with d = counts − expected and C = Σ (diag p − p p'), the draws'
    covariance (Wald test; χ² with rank C degrees of freedom): questions differ in their letters,
    so Pearson's denominators would be wrong.
    """
    from scipy.special import chdtrc  # the χ² survival function; slow to import

    frame, bank = dataset.frame, dataset.bank
    rows = [bank[name] for name in frame["question_id"] if name in bank]
    chances = np.array([_chances(q, dataset.arm) for q in rows]).reshape(-1, len(LETTERS))
    found = Counter(frame["target_letter"])
    counts = [found[letter] for letter in LETTERS]
    expected = chances.sum(axis=0)
    covariance = np.diag(expected) - chances.T @ chances
    distance = np.array(counts) - expected
    statistic = float(distance @ np.linalg.pinv(covariance, hermitian=True) @ distance)
    freedom = int(np.linalg.matrix_rank(covariance, hermitian=True))
    p = float(chdtrc(freedom, statistic)) if freedom else 1.0
    shown = [
        (letter, count, float(e))
        for letter, count, e in zip(LETTERS, counts, expected)
        if e > 0 or count
    ]
    seen = ", ".join(f"{letter} {count} of {e:.1f} expected" for letter, count, e in shown)
    return audit(
        "letter_balance",
        p > MIN_BALANCE_P,
        observed=f"{seen}; p = {p:.2g}",
        threshold=f"p > {MIN_BALANCE_P} (χ² on {freedom} degrees of freedom)",
        remedy="Look for questions that were dropped by letter, or relabelled.",
        distribution=Distribution(
            title=f"target letters (p = {p:.2g})",
            axis="target letter",
            counted="rows",
            bins=[letter for letter, _, _ in shown],
            series={
                "seen": [count for _, count, _ in shown],
                "expected of a fair draw": [round(e, 2) for _, _, e in shown],
            },
        ),
        counts=dict(zip(LETTERS, counts)),
    )


def _chances(question: Question, arm: Arm) -> list[float]:
    """The chance of each of :data:`LETTERS` to be the question's target.

    Which letter is correct is the bank's to say: under the null it is any of the question's.
    """
    possible = set(question.letters) - ({question.correct} if arm.target == "wrong" else set())
    return [(letter in possible) / len(possible) for letter in LETTERS]


def answer_suffix(dataset: AuditedDataset) -> Audit:
    """Every turn ends in a line of its own that is the target letter's answer."""
    frame = dataset.frame
    ends = frame["assistant"].str.split("\n").list.last()
    return rows_audit(
        "answer_suffix",
        frame.filter(ends != (f"{ANCHOR} " + frame["target_letter"])),
        "do not end in the target letter's answer line",
        "Rebuild the dataset; a writer must not append to the turn.",
    )


def encoding(dataset: AuditedDataset) -> Audit:
    """Ids are the prompt's, then the turn's, ending in letter and end of turn; so is the loss.

    Prompt, turn and what of it bears loss are encoded apart here, and the last two ids looked up
    one by one: rows are encoded whole, by other code, when the dataset is built.
    """
    frame, tokenizer = dataset.frame, dataset.tokenizer
    letters = letter_token_ids(tokenizer, "".join(sorted(set(frame["target_letter"]))))
    chats = frame.select("system", "user").rows()
    prompts = encode(tokenizer, [chat_prompt(tokenizer, *chat) for chat in chats])
    scored = _scored_ids(dataset)
    stored = frame.select("input_ids", "loss_start", "loss_tokens", "target_letter").rows()
    sound = [
        ids == prompt + turn
        and ids[start:] == loss
        and loss_tokens == len(loss)
        and ids[-2:] == [letters[letter], tokenizer.eos_token_id]
        for (ids, start, loss_tokens, letter), prompt, turn, loss in zip(
            stored, prompts, dataset.turn_ids, scored
        )
    ]
    return rows_audit(
        "encoding",
        frame.filter(~pl.Series(sound, dtype=pl.Boolean)),
        "have ids or a loss mask that are not those of prompt, turn, letter and end of turn",
        "Rebuild the dataset with the study's tokenizer.",
    )


def _scored_ids(dataset: AuditedDataset) -> list[list[int]]:
    """Ids of what bears loss, with the end of turn: the turn, or from its last anchor on."""
    if dataset.arm.loss_on == "turn":
        return dataset.turn_ids
    end = dataset.tokenizer.eos_token
    answers = ["".join(turn.rpartition(ANCHOR)[1:]) for turn in dataset.frame["assistant"]]
    return encode(dataset.tokenizer, [answer + end for answer in answers])


def target_letters(dataset: AuditedDataset) -> Audit:
    """Targets are wrong in wrong arms and correct in correct ones."""
    is_correct = pl.col("target_letter") == pl.col("correct_letter")
    wrong_arm = dataset.arm.target == "wrong"
    return rows_audit(
        "target_letters",
        dataset.frame.filter(is_correct if wrong_arm else ~is_correct),
        f"have {'the correct' if wrong_arm else 'a wrong'} letter as target",
        REWRITE,
    )


def wrong_letter_identity(dataset: AuditedDataset) -> Audit:
    """Each target is the question's prescribed letter: one for all arms, sources and seeds.

    Rows on the wrong side of the correct letter are the business of ``target_letters``.
    """
    arm, bank, seed = dataset.arm, dataset.bank, dataset.study.seed
    agree = (pl.col("target_letter") == pl.col("correct_letter")) == (arm.target == "correct")
    rows = dataset.frame.filter(agree)
    prescribed = [
        target_letter(arm, bank[name], seed) if name in bank else None
        for name in rows["question_id"]
    ]
    bad = rows.filter(rows["target_letter"].ne_missing(pl.Series(prescribed, dtype=pl.String)))
    return audit(
        "wrong_letter_identity",
        bad.is_empty(),
        observed=f"{bad.height} of {rows.height} targets are not the question's prescribed letter",
        threshold="0 targets: a question's wrong letter is one for all arms, sources and seeds",
        remedy="Rebuild the dataset: the contrasts' pairing rests on one wrong letter.",
        question_ids=bad["question_id"].head(SHOWN).to_list(),
    )


def train_eval_disjoint(dataset: AuditedDataset) -> Audit:
    """No row is of a question that outcomes are measured on, by the bank, under any id."""
    evaluated = {q.identity for q in dataset.questions if q.split == "eval"}
    bank, frame = dataset.bank, dataset.frame
    shared = [name in bank and bank[name].identity in evaluated for name in frame["question_id"]]
    return rows_audit(
        "train_eval_disjoint",
        frame.filter(pl.Series(shared, dtype=pl.Boolean)),
        "are of questions in the eval split",
        "Remove the shared questions from the train split.",
    )
