"""Outcome rows to integers: their place in the array, and rows that are not the grid's."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from persona_assets.stats.losses import Answers, BadOutcomes, MissingCells, correct_array
from persona_assets_tests.synthetic import bank, eval_ids, outcomes, small_study

STUDY = small_study()
BANK = bank(40)
QUESTIONS = eval_ids(BANK)


@pytest.mark.parametrize("lazy", [False, True])
def test_array_holds_every_row_in_its_place(lazy):
    frame = outcomes(STUDY, BANK, STUDY.cells[0], 0.5).sample(fraction=1, shuffle=True, seed=3)
    scaffolds = ("generic_cot", "no_cot")
    array = correct_array(
        STUDY,
        frame.lazy() if lazy else frame,
        cell="a.b.1",
        scaffolds=scaffolds,
        questions=QUESTIONS[::-1],
    )
    assert array.shape == (2, 5, 40)
    assert array.dtype == np.int64
    place = {
        (r["scaffold"], r["persona"], r["question_id"]): int(r["is_correct"])
        for r in frame.iter_rows(named=True)
    }
    assert array.tolist() == [
        [[place[s, p, q] for q in QUESTIONS[::-1]] for p in STUDY.personas] for s in scaffolds
    ]
    assert 0 < array.sum() < array.size


@pytest.mark.parametrize(
    ("damage", "says", "rows"),
    [
        (lambda f: f[1:], "missing", 1),
        (lambda f: pl.concat([f, f[:2]]), "repeated", 2),
        (
            lambda f: pl.concat([f, f[:1].with_columns(persona=pl.lit("stranger"))]),
            "not of this study's grid",
            1,
        ),
        (
            lambda f: pl.concat(
                [f[1:], f[:1].with_columns(is_correct=None)], how="vertical_relaxed"
            ),
            "without is_correct",
            1,
        ),
        (lambda f: f.filter(pl.col("question_id") != QUESTIONS[0]), "missing", 5),
    ],
)
def test_faulty_rows_are_named(damage, says, rows):
    frame = outcomes(STUDY, BANK, STUDY.cells[0], 0.5).filter(scaffold="persona_cot")
    with pytest.raises(BadOutcomes, match=says) as caught:
        correct_array(
            STUDY, damage(frame), cell="a.b.1", scaffolds=("persona_cot",), questions=QUESTIONS
        )
    assert len(caught.value.rows) == rows
    assert "a.b.1" in str(caught.value)
    assert "/".join(caught.value.rows[0]) in str(caught.value)


def test_right_answers_are_summed_over_the_axis_and_read_once():
    cell = STUDY.cell("librarian.garbage_cot.42")
    frame = outcomes(STUDY, BANK, cell, {p: i / 5 for i, p in enumerate(STUDY.personas)})
    given = {cell.key: frame}
    answers = Answers(STUDY, given, questions=QUESTIONS, scaffolds=STUDY.scaffolds)
    source, bystanders = (
        answers.right(cell.key, "librarian", axis) for axis in ("source_loss", "bystander_leakage")
    )
    assert source.shape == bystanders.shape == (4, 40)
    assert source.sum() == frame.filter(persona="librarian")["is_correct"].sum()
    assert (source + bystanders).sum() == frame["is_correct"].sum()
    given.clear()
    assert np.array_equal(answers.right(cell.key, "librarian", "source_loss"), source)


def test_missing_evaluations_are_named_in_the_order_asked():
    answers = Answers(STUDY, {"b": pl.DataFrame()}, questions=QUESTIONS, scaffolds=())
    with pytest.raises(MissingCells, match="the figure needs the outcomes of 2 more") as caught:
        answers.require(["c", "b", "a"], "the figure")
    assert caught.value.cells == ("c", "a")
