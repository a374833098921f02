import duckdb
import polars as pl
import pytest

from persona_assets.evaluation.outcomes import (
    MEASURED,
    SCHEMA,
    coverage_audit,
    outcome_table,
    outcomes_data_version,
    reachability_audit,
    truncation_audit,
)
from persona_assets.study import Cell

CELL = Cell("librarian", "persona_cot", 42, "carry_over")
PERSONAS, SCAFFOLDS, QUESTIONS = ("librarian", "villain"), ("no_cot", "persona_cot"), ("q0", "q1")


def measured(truncated=()):
    """Two personas × two scaffolds × two questions; ``truncated`` rows are cut at the limit."""
    rows = [
        (
            persona,
            scaffold,
            question,
            "B",
            "A",
            False,
            [{"key": "A", "value": -0.1}, {"key": "B", "value": -2.5}],
            "Hush." if scaffold == "persona_cot" else "",
            2 if scaffold == "persona_cot" else 0,
            None
            if scaffold == "no_cot"
            else ("length" if (persona, question) in truncated else "tag"),
            scaffold == "persona_cot" and (persona, question) in truncated,
            "ab" * 32,
        )
        for persona in PERSONAS
        for scaffold in SCAFFOLDS
        for question in QUESTIONS
    ]
    return pl.DataFrame(rows, schema=MEASURED, orient="row")


def table(frame=None, cell=CELL, run_id="run-1", checkpoint="c0ffee", code_version="1"):
    return outcome_table(
        measured() if frame is None else frame,
        study="mini",
        cell=cell,
        run_id=run_id,
        checkpoint_sha256=checkpoint,
        code_version=code_version,
    )


def test_cell_rows_say_which_cell_they_are():
    frame = table()
    assert frame.schema == SCHEMA
    assert frame.drop("persona", "is_source", "run_id").row(0, named=True) == {
        "study": "mini",
        "cell": "librarian.persona_cot.42",
        "source": "librarian",
        "arm": "persona_cot",
        "seed": 42,
        "origin": "carry_over",
        "scaffold": "no_cot",
        "question_id": "q0",
        "correct_letter": "B",
        "predicted_letter": "A",
        "is_correct": False,
        "letter_logprobs": [{"key": "A", "value": -0.1}, {"key": "B", "value": -2.5}],
        "rationale": "",
        "rationale_tokens": 0,
        "stop_reason": None,
        "truncated": False,
        "prompt_sha256": "ab" * 32,
        "checkpoint_sha256": "c0ffee",
        "code_version": "1",
    }
    assert frame["is_source"].to_list() == [True] * 4 + [False] * 4
    assert frame.select(MEASURED.names()).equals(measured())


def test_baseline_rows_belong_to_no_cell():
    frame = table(cell=None, checkpoint=None)
    assert frame.schema == SCHEMA
    assert set(frame["cell"]) == {"baseline"}
    for column in ("source", "arm", "seed", "origin", "is_source", "checkpoint_sha256"):
        assert frame[column].is_null().all(), column


@pytest.mark.parametrize(("cell", "checkpoint"), [(CELL, None), (None, "c0ffee")])
def test_cells_have_checkpoints_and_the_baseline_has_none(cell, checkpoint):
    with pytest.raises(ValueError, match="every cell has a checkpoint"):
        table(cell=cell, checkpoint=checkpoint)


def test_duckdb_reads_the_log_probabilities_as_a_map(tmp_path):
    path = tmp_path / "outcomes.parquet"
    table().write_parquet(path)
    value = duckdb.sql(
        f"SELECT map_from_entries(letter_logprobs)['B'] FROM '{path}' LIMIT 1"
    ).fetchall()
    assert value == [(-2.5,)]


def test_equal_results_of_another_run_have_an_equal_version():
    assert outcomes_data_version(table()) == outcomes_data_version(table(run_id="run-2"))


@pytest.mark.parametrize(
    "other",
    [
        table(code_version="2"),
        table(checkpoint="beef"),
        table(measured().reverse()),
        table(measured([("villain", "q1")])),
        table(
            measured().with_columns(
                pl.lit([{"key": "A", "value": -0.1}, {"key": "B", "value": -2.5000000000000004}])
                .cast(MEASURED["letter_logprobs"])
                .alias("letter_logprobs")
            )
        ),
    ],
)
def test_any_other_difference_is_another_version(other):
    assert outcomes_data_version(table()) != outcomes_data_version(other)


def test_version_survives_parquet(tmp_path):
    table().write_parquet(tmp_path / "o.parquet")
    assert outcomes_data_version(pl.read_parquet(tmp_path / "o.parquet")) == (
        outcomes_data_version(table())
    )


def test_coverage_of_the_whole_grid():
    found = coverage_audit(table(), PERSONAS, SCAFFOLDS, QUESTIONS)
    assert found.status == "passed"
    assert found.observed == "8 rows: 0 missing, 0 repeated, 0 not of the grid"


def test_coverage_counts_what_is_wrong():
    frame = table()
    found = coverage_audit(
        pl.concat([frame[1:], frame[2:3]]), ["librarian", "villain"], SCAFFOLDS, ["q0", "q1", "q2"]
    )
    assert found.blocks
    assert found.observed == "8 rows: 5 missing, 1 repeated, 0 not of the grid"
    assert found.details["missing"][0] == "librarian/no_cot/q0"
    found = coverage_audit(frame, ["librarian"], SCAFFOLDS, QUESTIONS)
    assert found.observed == "8 rows: 0 missing, 0 repeated, 4 not of the grid"
    assert found.blocks
    assert found.details["unknown"][0] == "villain/no_cot/q0"
    found = coverage_audit(pl.concat([frame, frame[:2]]), PERSONAS, SCAFFOLDS, QUESTIONS)
    assert found.blocks
    assert found.details["repeated"] == ["librarian/no_cot/q0", "librarian/no_cot/q1"]


def test_reachability_names_questions_whose_answer_was_not_scored():
    assert reachability_audit(table()).status == "passed"
    letter = pl.when(pl.col("question_id") == "q1").then(pl.lit("E")).otherwise("correct_letter")
    found = reachability_audit(table().with_columns(correct_letter=letter))
    assert found.blocks
    assert found.details["questions"] == ["q1"]
    assert found.observed.startswith("1 question(s)")


def test_a_row_without_letters_is_not_reachable():
    empty = pl.when(pl.col("question_id") == "q1").then(None).otherwise("letter_logprobs")
    found = reachability_audit(table().with_columns(letter_logprobs=empty))
    assert found.blocks
    assert found.details["questions"] == ["q1"]


@pytest.mark.parametrize(("cut", "status"), [(1, "passed"), (2, "failed")])
def test_one_rationale_in_twenty_may_be_cut_off(cut, status):
    frame = pl.concat([table()] * 5).filter(scaffold="persona_cot")  # 10 rows a persona
    frame = pl.concat([frame, frame]).with_columns(
        truncated=(pl.col("persona") == "villain") & (pl.int_range(pl.len()).over("persona") < cut)
    )
    found = truncation_audit(frame)
    assert found.status == status
    assert found.details["shares"] == {"villain/persona_cot": cut / 20, "librarian/persona_cot": 0}


def test_truncation_names_the_worst_persona_and_scaffold():
    found = truncation_audit(table(measured([("villain", "q1")])))
    assert (found.status, found.blocking, found.blocks) == ("failed", False, False)
    assert "50.0%" in found.observed
    assert "villain/persona_cot" in found.observed
    assert found.details["shares"] == {"villain/persona_cot": 0.5, "librarian/persona_cot": 0.0}
    assert truncation_audit(table()).status == "passed"


def test_nothing_generated_is_nothing_truncated():
    found = truncation_audit(table().filter(scaffold="no_cot"))
    assert found.status == "passed"
    assert "none" in found.observed
