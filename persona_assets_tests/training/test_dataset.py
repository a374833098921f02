"""A cell's dataset: its rows, their order, and what is left out."""

from __future__ import annotations

import polars as pl
import pytest

from persona_assets.questions.bank import user_message
from persona_assets.study import Study, parse_study
from persona_assets.training.dataset import SCHEMA, DatasetError, row_order, training_data_version
from persona_assets_tests import small_study as small

KEY = "librarian.scrambled_english_cot.42"


def test_rows_hold_the_conversation_and_its_encoding(mini):
    cell = mini.cell(KEY)
    rationales = small.rationales(mini, cell.condition)
    frame = small.dataset(mini, cell, rationales)
    assert frame.schema == SCHEMA
    assert frame["position"].to_list() == list(range(len(small.TRAIN)))
    assert sorted(frame["question_id"]) == sorted(q.id for q in small.TRAIN)
    assert set(frame["system"]) == {mini.personas["librarian"]}
    bank = {q.id: q for q in small.TRAIN}
    written = dict(rationales.select("question_id", "rationale").rows())
    for row in frame.iter_rows(named=True):
        question = bank[row["question_id"]]
        assert row["user"] == user_message(question)
        assert row["assistant"] == (
            f"<thinking>\n{written[question.id]}\n</thinking>\nAnswer: {row['target_letter']}"
        )
        assert len(row["input_ids"]) - row["loss_start"] == row["loss_tokens"]
        assert row["reference_loss_tokens"] == row["loss_tokens"]
    assert not frame["reference_only"].any()


def test_the_seed_sets_the_order_and_nothing_else(mini):
    frames = [small.dataset(mini, mini.cell(f"librarian.garbage_cot.{s}")) for s in mini.seeds]
    by_question = [f.drop("position", "seed").sort("question_id") for f in frames]
    assert by_question[0].equals(by_question[1])
    assert by_question[0].equals(by_question[2])
    orders = {tuple(f["question_id"]) for f in frames}
    assert len(orders) == 3
    other = small.dataset(mini, mini.cell("comedian.contradicting_cot.42"))
    assert other["question_id"].equals(frames[0]["question_id"])


def test_row_order_is_a_fixed_permutation():
    assert row_order(186, 42, 8).tolist() == [3, 6, 2, 0, 1, 5, 4, 7]
    assert sorted(row_order(186, 137, 100)) == list(range(100))


def test_a_dropped_row_moves_no_other(mini):
    cell = mini.cell(KEY)
    rationales = small.rationales(mini, cell.condition)
    gone = rationales["question_id"][3]
    whole = small.dataset(mini, cell, rationales)
    problem = pl.when(pl.col("question_id") == gone).then(pl.lit("refused"))
    part = small.dataset(mini, cell, rationales.with_columns(problem=problem))
    assert part["question_id"].to_list() == [q for q in whole["question_id"] if q != gone]


def test_carried_over_cells_are_marked(mini):
    assert small.dataset(mini, mini.cell("librarian.persona_cot.42"))["reference_only"].all()


def test_the_version_is_of_what_is_trained_on(mini):
    """The reference's length is none of it: rewording the reference retrains no written arm."""
    frame = small.dataset(mini, mini.cell("librarian.contradicting_cot.42"))
    version = training_data_version(frame)
    moved = frame.with_columns(pl.col("reference_loss_tokens") + 1)
    assert training_data_version(moved) == version
    for column in ("input_ids", "loss_start", "assistant", "target_letter"):
        spoiled = frame.with_columns(pl.col(column).reverse())
        assert training_data_version(spoiled) != version, column


def test_loss_on_the_answer_masks_the_rationale(answer_only):
    study, cell = answer_only, answer_only.cell("librarian.context_cot.42")
    frame = small.dataset(study, cell)
    tokenizer = small.tokenizer()
    generic = small.dataset(study, study.cell("librarian.generic_cot.42"))
    assert frame["input_ids"].equals(generic["input_ids"])
    for row in frame.iter_rows(named=True):
        ids, start = row["input_ids"], row["loss_start"]
        answer = tokenizer(f"Answer: {row['target_letter']}{tokenizer.eos_token}")["input_ids"]
        assert ids[start:] == answer
        assert row["loss_tokens"] == len(answer) < row["reference_loss_tokens"]


@pytest.fixture
def answer_only(study_texts) -> Study:
    """The mini study with an arm whose rationale bears no loss."""
    definition = (
        "define:\n  arms:\n    context_cot: {scaffold: generic_cot, target: wrong, "
        "rationale: written, loss_on: answer}\narms:\n  context_cot: {origin: trained}\n"
    )
    return parse_study(study_texts["mini"].replace("arms:\n", definition, 1))


def test_a_missing_reference_is_null(mini):
    cell = mini.cell("librarian.persona_cot.42")
    rationales = small.rationales(mini, cell.condition).with_columns(
        reference_rationale=pl.lit(None, pl.String)
    )
    assert small.dataset(mini, cell, rationales)["reference_loss_tokens"].null_count() == 60


def test_rationales_of_another_bank_are_refused(mini):
    cell = mini.cell(KEY)
    rationales = small.rationales(mini, cell.condition)
    foreign = rationales.with_columns(question_id=pl.lit("foreign"))
    with pytest.raises(DatasetError, match="hold question 'foreign', which is no train question"):
        small.dataset(mini, cell, foreign)
    with pytest.raises(DatasetError, match="no usable row"):
        small.dataset(mini, cell, rationales.with_columns(problem=pl.lit("refused")))
