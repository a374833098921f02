"""Dataset audits: sound datasets pass all of them; each spoiled property fails exactly its own."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from persona_assets.rationales.arms import ARMS
from persona_assets.training.audit_rows import letter_balance
from persona_assets.training.audited import AuditedDataset
from persona_assets.training.encoding import encode_rows
from persona_assets_tests import small_study as small
from persona_assets_tests.training.material import (
    CONTEXT,
    CONTRADICTING,
    CORRECT,
    GARBAGE,
    GENERIC,
    SCRAMBLED,
    WRITTEN,
    matched,
)


@pytest.mark.parametrize("arm", [*ARMS, CONTEXT])
def test_a_sound_dataset_passes(material, arm):
    assert material.failures(arm) == []


def test_each_arm_has_the_audits_that_concern_it(miniature):
    common = {
        "rows_complete",
        "rows_as_prescribed",
        "letter_balance",
        "answer_suffix",
        "encoding",
        "target_letters",
        "wrong_letter_identity",
        "train_eval_disjoint",
        "byte_fallback",
    }
    argued = common | {"loss_token_parity", "lexical_variety"}
    assert set(miniature.audits("no_cot")) == common
    for arm in (*WRITTEN, CONTEXT):
        assert set(miniature.audits(arm)) == argued | {"argued_letter"}
    assert set(miniature.audits(GARBAGE)) == argued | {"garbage_words"}
    assert set(miniature.audits(SCRAMBLED)) == argued | {"scrambled_words"}


@pytest.mark.parametrize("arm", [CONTRADICTING, CORRECT, "no_cot"])
def test_unbalanced_letters(material, arm):
    kept, table = material.without(arm, pl.col("target_letter") != "A")
    found = material.only_failure("letter_balance", arm, kept, table)
    assert found.observed.startswith(f"A {kept.height} of ")
    assert found.details["counts"] == dict.fromkeys("BCDE", 0) | {"A": kept.height}
    seen, expected = found.distribution.series.values()
    assert dict(zip(found.distribution.bins, seen))["A"] == kept.height
    assert sum(seen) == pytest.approx(sum(expected), abs=0.03) == kept.height


def test_letter_balance_takes_three_and_five_choices(miniature):
    """The statistic against its own formula for three questions of 3, 4 and 5 letters."""
    questions = [
        replace(small.TRAIN[i], id=str(n), choices=tuple("vwxyz"[:n]), correct="A")
        for i, n in enumerate((3, 4, 5))
    ]
    frame = pl.DataFrame({"question_id": ["3", "4", "5"], "target_letter": ["B", "B", "E"]})
    cell = miniature.study.cell("librarian.garbage_cot.42")
    found = letter_balance(
        AuditedDataset(
            frame, miniature.study, cell, questions, frame, miniature.tokenizer, miniature.writer
        )
    )
    assert found.status == "passed"
    assert found.observed.startswith(
        "B 2 of 1.1 expected, C 0 of 1.1 expected, D 0 of 0.6 expected, E 1 of 0.2 expected"
    )
    assert "3 degrees of freedom" in found.threshold


@pytest.mark.parametrize("arm", [CONTRADICTING, GARBAGE, "no_cot"])
def test_an_answer_that_is_no_line_of_its_own(material, arm):
    frame = material.dataset(arm)
    turn = frame["assistant"][2].replace("Answer:", "So Answer:")
    spoiled = matched(material.rewritten(frame, {2: {"assistant": turn}}))
    assert material.failures(arm, spoiled) == ["answer_suffix"]


def test_text_after_the_answer(miniature):
    frame = miniature.dataset(CONTRADICTING)
    # The tokenizer has no token for a line break or a stop: there, the ids are still sound.
    for more, failed in ((" moss", ["encoding"]), ("\n", []), (".", [])):
        turn = frame["assistant"][2] + more
        names = miniature.failures(
            CONTRADICTING, miniature.rewritten(frame, {2: {"assistant": turn}})
        )
        assert names == ["answer_suffix", *failed]


def test_the_answer_of_another_letter(material):
    frame = material.dataset(CONTRADICTING)
    other = next(c for c in "ABCD" if c != frame["target_letter"][2])
    turn = frame["assistant"][2][:-1] + other
    spoiled = material.rewritten(frame, {2: {"assistant": turn}})
    assert material.failures(CONTRADICTING, spoiled) == ["answer_suffix", "encoding"]


IDS, START, COUNT = pl.col("input_ids"), pl.col("loss_start"), pl.col("loss_tokens")


@pytest.mark.parametrize("arm", [CONTRADICTING, CONTEXT])
@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": IDS.list.reverse()},
        {"loss_start": START - 1, "loss_tokens": COUNT + 1},
        {"loss_start": START + 1, "loss_tokens": COUNT - 1},
        {"loss_start": START - 1},
        {"loss_tokens": COUNT + 1},
        {"input_ids": IDS.list.head(IDS.list.len() - 1), "loss_tokens": COUNT - 1},
        {"input_ids": IDS.list.tail(IDS.list.len() - 1), "loss_start": START - 1},
    ],
    ids=[
        "other ids",
        "early loss",
        "late loss",
        "other start",
        "other count",
        "no end of turn",
        "no beginning",
    ],
)
def test_ids_or_mask_of_another_text(material, arm, changes):
    frame = material.dataset(arm)
    row = pl.col("position") == 7
    spoiled = frame.with_columns(
        pl.when(row).then(value).otherwise(name).alias(name) for name, value in changes.items()
    )
    found = material.only_failure("encoding", arm, spoiled)
    assert found.details["question_ids"] == [frame["question_id"][7]]


def test_rows_that_were_all_encoded_without_their_end_of_turn(miniature, monkeypatch):
    """The audit must not rest on the code that it looks at."""

    def cut(tokenizer, rows):
        return [replace(r, input_ids=r.input_ids[:-1]) for r in encode_rows(tokenizer, rows)]

    for module in ("dataset", "encoding"):
        monkeypatch.setattr(f"persona_assets.training.{module}.encode_rows", cut)
    frame = small.dataset(miniature.study, miniature.study.cell("librarian.contradicting_cot.42"))
    assert miniature.failures(CONTRADICTING, frame) == ["encoding"]


def retargeted(material, frame: pl.DataFrame, index: int, letter: str) -> pl.DataFrame:
    turn = frame["assistant"][index][:-1] + letter
    return material.rewritten(frame, {index: {"assistant": turn, "target_letter": letter}})


@pytest.mark.parametrize("arm", [CONTRADICTING, CORRECT, GARBAGE, "no_cot"])
def test_the_correct_letter_in_a_wrong_arm_and_conversely(material, arm):
    frame = material.dataset(arm)
    correct = frame["correct_letter"][4]
    other = next(c for c in "ABCD" if c != correct)
    spoiled = retargeted(material, frame, 4, other if arm == CORRECT else correct)
    assert material.failures(arm, spoiled) == ["target_letters"]


@pytest.mark.parametrize("arm", [CONTRADICTING, GARBAGE, SCRAMBLED, GENERIC, "no_cot"])
def test_another_wrong_letter_than_prescribed(material, arm):
    frame = material.dataset(arm)
    taken = {frame["correct_letter"][4], frame["target_letter"][4]}
    spoiled = retargeted(material, frame, 4, next(c for c in "ABCD" if c not in taken))
    found = material.only_failure("wrong_letter_identity", arm, spoiled)
    assert found.details["question_ids"] == [frame["question_id"][4]]
    assert found.observed.startswith(f"1 of {frame.height} targets are not")


@pytest.mark.parametrize("arm", ["contradicting_cot", "no_cot"])
def test_a_question_of_the_eval_split(material, arm):
    frame = material.dataset(arm)
    shared = next(q for q in material.train if q.id == frame["question_id"][9])
    questions = [*material.questions, replace(shared, id="again", split="eval")]
    assert material.failures(arm, questions=questions) == ["train_eval_disjoint"]
    moved = [replace(q, split="eval") if q is shared else q for q in material.questions]
    found = material.only_failure("train_eval_disjoint", arm, questions=moved)
    assert found.details["question_ids"] == [shared.id]
