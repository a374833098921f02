"""Rows that are not what study, questions and rationales make them, or not there at all."""

from __future__ import annotations

import polars as pl
import pytest

from persona_assets.questions.bank import user_message
from persona_assets_tests import small_study as small
from persona_assets_tests.training.material import (
    CONTRADICTING,
    GARBAGE,
    GENERIC,
    PERSONA,
    SCRAMBLED,
    matched,
)


def everywhere(material, frame, **columns):
    """``frame`` with other texts in all rows, encoded again."""
    rows = frame.with_columns(**columns).select(*columns).to_dicts()
    return matched(material.rewritten(frame, dict(enumerate(rows))))


def prescribed(material, arm, frame, *names: str):
    """Its own audit fails, alone, and names what differs."""
    found = material.only_failure("rows_as_prescribed", arm, frame)
    assert found.blocks
    assert list(found.details["differing"]) == list(names)
    return found.details["differing"]


@pytest.mark.parametrize("arm", [PERSONA, CONTRADICTING])
def test_the_tags_of_another_scaffold_or_none(material, arm):
    frame = material.dataset(arm)
    turn = pl.col("assistant")
    for tags, other in (("persona-thinking", "thinking"), (r"</?persona-thinking>\n", "")):
        spoiled = everywhere(material, frame, assistant=turn.str.replace_all(tags, other))
        found = prescribed(material, arm, spoiled, "tags or rationale")
        assert found["tags or rationale"]["rows"] == frame.height


@pytest.mark.parametrize("arm", [PERSONA, GARBAGE, "no_cot"])
def test_the_system_prompt_of_another_persona(material, arm):
    other = material.study.personas["comedian"]
    spoiled = everywhere(material, material.dataset(arm), system=pl.lit(other))
    prescribed(material, arm, spoiled, "system")


@pytest.mark.parametrize("arm", [PERSONA, SCRAMBLED, "no_cot"])
def test_another_row_s_question(material, arm):
    frame = material.dataset(arm)
    other = {5: {"user": frame["user"][6]}, 6: {"user": frame["user"][5]}}
    found = prescribed(material, arm, material.rewritten(frame, other), "user")
    assert found["user"] == {"rows": 2, "question_ids": frame["question_id"][5:7].to_list()}


def test_the_questions_of_the_eval_split(material):
    asked = next(user_message(q) for q in material.questions if q.split == "eval")
    spoiled = everywhere(material, material.dataset(PERSONA), user=pl.lit(asked))
    prescribed(material, PERSONA, spoiled, "user")


@pytest.mark.parametrize(("arm", "foreign"), [(PERSONA, GENERIC), (GENERIC, PERSONA)])
def test_the_rationales_of_another_arm(material, arm, foreign):
    """They argue for the same letters, in another voice."""
    frame = material.dataset(arm)
    ours, theirs = (material.texts(frame, name) for name in (arm, foreign))
    turns = [t.replace(a, b) for t, a, b in zip(frame["assistant"], ours, theirs)]
    spoiled = everywhere(material, frame, assistant=pl.Series(turns))
    prescribed(material, arm, spoiled, "tags or rationale")


def test_the_rationale_of_another_question_of_the_same_letter(material):
    frame = material.dataset(CONTRADICTING)
    a, b = frame.with_row_index().filter(correct_letter="A")["index"].head(2)
    texts = material.texts(frame, CONTRADICTING)
    turns = {
        i: {"assistant": frame["assistant"][i].replace(texts[i], texts[j])}
        for i, j in ((a, b), (b, a))
    }
    spoiled = material.rewritten(frame, turns)
    found = prescribed(material, CONTRADICTING, spoiled, "tags or rationale")
    assert found["tags or rationale"]["rows"] == 2


@pytest.mark.parametrize("arm", [PERSONA, GARBAGE])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "comedian"),
        ("arm", "no_cot"),
        ("seed", 137),
        ("reference_only", True),
        ("identity", "0"),
        ("source", None),
    ],
)
def test_a_column_that_is_another_cell_s(material, arm, name, value):
    frame = material.dataset(arm)
    second = pl.when(pl.col("position") == 1)
    spoiled = frame.with_columns(second.then(value and pl.lit(value)).otherwise(name).alias(name))
    found = prescribed(material, arm, spoiled, name)
    assert found == {name: {"rows": 1, "question_ids": [frame["question_id"][1]]}}


def test_another_correct_letter_than_the_bank_s(material):
    """The row's own target is still no correct letter."""
    frame = material.dataset(GARBAGE)
    taken = {frame["correct_letter"][1], frame["target_letter"][1]}
    other = pl.lit(next(c for c in "ABCD" if c not in taken))
    second = pl.when(pl.col("position") == 1)
    spoiled = frame.with_columns(correct_letter=second.then(other).otherwise("correct_letter"))
    prescribed(material, GARBAGE, spoiled, "correct_letter")


@pytest.mark.parametrize("arm", [GARBAGE, PERSONA, "no_cot"])
def test_missing_repeated_and_moved_rows(material, arm):
    frame = material.dataset(arm)
    names = frame["question_id"].to_list()
    recount = pl.int_range(pl.len(), dtype=pl.Int32).alias("position")
    spoiled = {
        "missing": (frame.slice(1).with_columns(recount), [names[0]]),
        "repeated": (pl.concat([frame, frame[:1]]).with_columns(recount), [names[0]]),
        "moved": (frame.sort("question_id").with_columns(recount), []),
        "counted": (frame.with_columns(position=pl.lit(0, pl.Int32)), []),
        "one position": (frame.with_columns(position=pl.col("position") + 1), []),
    }
    for fault, (rows, ids) in spoiled.items():
        found = material.only_failure("rows_complete", arm, rows)
        assert found.blocks
        assert {f: n for f, n in found.details["question_ids"].items() if n} == (
            {fault: ids} if ids else {}
        )


def test_the_order_of_another_seed(miniature):
    """The same rows, in an order that is none of this cell's."""
    frame = small.dataset(miniature.study, miniature.study.cell("librarian.no_cot.137"))
    frame = frame.with_columns(seed=pl.lit(42, pl.Int64))
    assert miniature.failures("no_cot", frame) == ["rows_complete"]


def test_a_row_of_a_dropped_rationale(material):
    name = material.dataset("no_cot")["question_id"][3]
    _, table = material.without("no_cot", pl.col("question_id") == name)
    frame = material.dataset("no_cot")
    found = material.only_failure("rows_complete", "no_cot", frame, table)
    assert found.details["question_ids"]["foreign"] == [name]
    assert found.observed.startswith(f"{frame.height} rows: 0 questions no rationale")


def test_a_dropped_rationale_is_no_missing_row(material):
    """It moves no other row, and the rest are complete."""
    name = material.dataset("no_cot")["question_id"][3]
    frame, table = material.without("no_cot", pl.col("question_id") == name)
    assert frame.height == len(material.train) - 1
    assert material.failures("no_cot", frame, table) == []


def test_rationales_of_a_part_of_the_questions(material):
    table = material.rationales("no_cot").slice(3)
    frame = material.built("no_cot", table)
    found = material.only_failure("rows_complete", "no_cot", frame, table)
    assert found.details["question_ids"]["no rationale"] == [q.id for q in material.train[:3]]
