"""The earlier experiment's table: read whole, refused with reasons, compared count by count."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_assets.evaluation.drift import (
    PRIOR_ACCURACIES,
    PUBLISHED_CHANGES,
    SCAFFOLD_NAMES,
    PriorTableError,
    drift_audit,
    drift_table,
    letter_labelled,
    read_prior_table,
)
from persona_assets.questions.bank import Question
from persona_assets.reporting.distribution import distribution_plot
from persona_assets_tests.synthetic import bank, eval_ids, outcomes, small_study

PRIOR_DIR = "PERSONA_ASSETS_PRIOR_DIR"
KEY = "villain / persona_cot / no-cot / librarian / 42"


def written(folder: Path, table: object, **other: object) -> Path:
    path = folder / "earlier.json"
    raw = {"accuracy_table": table, "baseline_metadata": {"n_questions": 1172}} | other
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


# --- reading -------------------------------------------------------------------------------------


def test_a_table_is_read_under_our_names(tmp_path):
    path = written(tmp_path, {KEY: 991 / 1172, KEY.replace("no-cot", "empty-persona-cot-eval"): 1})
    frame = read_prior_table(path)
    assert frame.schema == PRIOR_ACCURACIES
    assert frame.rows() == [
        ("librarian.persona_cot.42", "villain", "no_cot", 991, 1172),
        ("librarian.persona_cot.42", "villain", "empty_persona_cot", 1172, 1172),
    ]


_NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
_KEYS = st.tuples(
    _NAMES, _NAMES, st.sampled_from(sorted(SCAFFOLD_NAMES)), _NAMES, st.integers(0, 2**31 - 1)
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), n=st.integers(1, 1_000_000))
def test_every_table_of_whole_counts_survives(tmp_path, data, n):
    counts = data.draw(st.dictionaries(_KEYS, st.integers(0, n), min_size=1, max_size=8))
    table = {" / ".join(map(str, key)): count / n for key, count in counts.items()}
    frame = read_prior_table(written(tmp_path, table, baseline_metadata={"n_questions": n}))
    assert frame.rows() == [
        (f"{source}.{arm}.{seed}", persona, SCAFFOLD_NAMES[scaffold], count, n)
        for (persona, arm, scaffold, source, seed), count in counts.items()
    ]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=8),
        lambda part: (
            st.lists(part, max_size=3)
            | st.dictionaries(
                st.sampled_from(["accuracy_table", "baseline_metadata", "n_questions", KEY]), part
            )
        ),
    ).map(json.dumps)
)
def test_anything_else_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(PriorTableError, match=r"other\.json"):
        read_prior_table(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.text(max_size=40))
def test_a_key_of_another_shape_is_named(tmp_path, key):
    with pytest.raises(PriorTableError, match="accuracy_table") as error:
        read_prior_table(written(tmp_path, {key: 0.5}))
    assert repr(key) in str(error.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (KEY.replace("no-cot", "no_cot"), "has the scaffold 'no_cot'. Use one of no-cot"),
        (KEY.replace("42", "042"), "has the seed '042'"),
        (KEY.replace("42", "9" * 5000), "has the seed"),
        (KEY.replace(" / ", "/"), "is no such key"),
        (KEY + " / x", "is no such key"),
        (KEY.replace("villain", " "), "is no such key"),
    ],
)
def test_a_key_is_refused_with_its_fault(tmp_path, key, message):
    with pytest.raises(PriorTableError) as error:
        read_prior_table(written(tmp_path, {key: 0.5}))
    assert message in str(error.value)


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, True, None, "0.5", 10**400])
def test_an_accuracy_is_a_share(tmp_path, accuracy):
    with pytest.raises(PriorTableError, match="Give the share of correct answers, 0 to 1"):
        read_prior_table(written(tmp_path, {KEY: accuracy}))


def test_an_accuracy_is_a_whole_count(tmp_path):
    assert read_prior_table(written(tmp_path, {KEY: 991 / 1172 + 1e-13}))["correct"][0] == 991
    with pytest.raises(PriorTableError) as error:
        read_prior_table(written(tmp_path, {KEY: 0.8456}))
    assert f"earlier.json: accuracy_table[{KEY!r}]: is 0.8456, 991.043200 of 1172" in str(
        error.value
    )
    assert "Mend the accuracy, or baseline_metadata.n_questions" in str(error.value)


@pytest.mark.parametrize("n", [0, -1, 1172.0, "1172", None, True, 10**30])
def test_the_number_of_questions_is_a_whole_number(tmp_path, n):
    path = written(tmp_path, {KEY: 0.5}, baseline_metadata={"n_questions": n})
    with pytest.raises(PriorTableError, match=r"baseline_metadata\.n_questions: is"):
        read_prior_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ('{"accuracy_table": {"a": 1, "a": 1}}', "the key 'a' occurs twice"),
        ('{"accuracy_table": NaN}', "NaN is no number"),
        ("[" * 100_000, "is no JSON"),
        ("{}", "baseline_metadata.n_questions: is missing"),
        ('{"baseline_metadata": {}}', "baseline_metadata.n_questions: is missing"),
        ('{"baseline_metadata": {"n_questions": 3}}', "accuracy_table: is missing"),
        (
            '{"baseline_metadata": {"n_questions": 3}, "accuracy_table": {}}',
            "accuracy_table: holds no entries",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PriorTableError) as error:
        read_prior_table(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(PriorTableError, match="cannot be read"):
        read_prior_table(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PriorTableError, match="cannot be read"):
        read_prior_table(tmp_path / "bytes.json")


def test_a_pinned_table_is_that_table(tmp_path):
    path = written(tmp_path, {KEY: 0.5})
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_prior_table(path, sha256).height == 1
    with pytest.raises(PriorTableError, match=f"has the hash {sha256}, and the pinned one is 0000"):
        read_prior_table(path, "0" * 64)


# --- comparing -----------------------------------------------------------------------------------

STUDY = small_study()
CELL = next(cell for cell in STUDY.cells if cell.origin == "carry_over")
BANK = bank(50)
IDS = eval_ids(BANK)
ROWS = outcomes(STUDY, BANK, CELL, 0.8)


def earlier(frame: pl.DataFrame = ROWS, questions: int = 50, **changes: int) -> pl.DataFrame:
    """What an earlier experiment that found the same would have kept; ``changes`` by persona."""
    kept = frame.group_by("persona", "scaffold", maintain_order=True).agg(
        pl.col("is_correct").sum().cast(pl.Int64).alias("correct"),
        pl.lit(questions, pl.Int64).alias("questions"),
    )
    change = pl.col("persona").replace_strict(changes, default=0, return_dtype=pl.Int64)
    return kept.with_columns(correct=pl.col("correct") + change)


def test_labels_of_figures_are_not_letters():
    labels = {"q0": "ABCD", "q1": "1234", "q2": "ABC", "q3": "123", "q4": "ABCDE", "q5": ""}
    questions = [
        Question(name, "eval", name, ("a", "b"), "A", tuple(published))
        for name, published in labels.items()
    ]
    assert letter_labelled(questions) == ["q0", "q2", "q4", "q5"]


def test_the_same_counts_do_not_drift_at_all():
    found = drift_audit(ROWS, earlier(), tolerance=0.0, readable=IDS)
    assert (found.status, found.blocking) == ("passed", False)
    assert "accuracy differs by at most 0.0000" in found.observed
    assert "0 of 20 persona × scaffolds beyond tolerance" in found.observed
    assert found.details["mean_difference"] == 0
    assert found.distribution.limits == [0.0]


def test_one_answer_is_drift_where_none_is_tolerated():
    found = drift_audit(ROWS, earlier(villain=1), tolerance=0.0, readable=IDS)
    assert (found.status, found.blocks) == ("failed", False)
    assert "4 of 20 persona × scaffolds beyond tolerance" in found.observed
    assert found.details["mean_difference"] == pytest.approx(-0.02 * 4 / 20)


@pytest.mark.parametrize(("change", "status"), [(-1, "passed"), (1, "passed"), (2, "failed")])
def test_a_difference_of_the_tolerance_is_tolerated(change, status):
    found = drift_audit(ROWS, earlier(villain=change), tolerance=0.02, readable=IDS)
    assert found.status == status


def test_the_worst_persona_and_scaffold_are_named_with_their_counts():
    prior = earlier(villain=3, librarian=-5)
    found = drift_audit(
        ROWS, prior, tolerance=0.02, readable=IDS, changes=["the anchor", "the reader"]
    )
    worst = prior.filter(persona="librarian").row(0, named=True)
    assert found.observed == (
        f"{CELL.key}: accuracy differs by at most 0.1000 (librarian/{worst['scaffold']}: "
        f"{worst['correct'] + 5} correct, {worst['correct']} before, of 50), by 0.0320 in the "
        "mean; 8 of 20 persona × scaffolds beyond tolerance"
    )
    assert [row["persona"] for row in found.details["worst"][:8]] == ["librarian"] * 4 + [
        "villain"
    ] * 4
    assert found.remedy.endswith("Known to differ: the anchor. Known to differ: the reader.")
    assert sum(found.distribution.series["persona × scaffolds"]) == 20
    assert found.distribution.limits == [-0.02, 0.02]
    assert distribution_plot(found.distribution)


def test_questions_that_the_earlier_reader_could_not_read_are_left_out():
    unread = IDS[:10]
    readable = [name for name in IDS if name not in unread]
    prior = earlier(ROWS.filter(~pl.col("question_id").is_in(unread)))
    found = drift_audit(ROWS, prior, tolerance=0.0, readable=readable)
    assert found.status == "passed"
    assert found.details["questions_left_out"] == 10
    assert found.details["worst"][0]["questions"] == 40
    assert drift_audit(ROWS, prior, tolerance=0.0, readable=IDS).status == "failed"


@pytest.mark.parametrize(("tolerance", "status"), [(0.05, "passed"), (0.049, "failed")])
def test_the_tolerance_is_a_share_of_the_questions_compared(tolerance, status):
    """Two answers of the 40 that were readable, not of the 50 that were asked."""
    prior = earlier(ROWS.filter(pl.col("question_id").is_in(IDS[10:])), villain=-2)
    found = drift_audit(ROWS, prior, tolerance=tolerance, readable=IDS[10:])
    assert found.status == status


def test_differences_are_shares_of_the_questions_compared():
    table = drift_table(ROWS, earlier(villain=2), IDS[:40] + IDS[40:])
    assert table.columns == ["persona", "scaffold", "questions", "before", "now", "difference"]
    villain = table.filter(persona="villain")
    assert (villain["before"] - villain["now"]).to_list() == [2] * 4
    assert villain["difference"].to_list() == [-0.04] * 4


def test_scaffolds_of_ours_alone_are_counted_and_not_compared():
    prior = earlier().filter(pl.col("scaffold") != "generic_cot")
    found = drift_audit(ROWS, prior, tolerance=0.0, readable=IDS)
    assert found.status == "passed"
    assert "of 15 persona × scaffolds" in found.observed
    assert found.details["not_in_the_table"] == 5


@pytest.mark.parametrize(
    ("prior", "readable", "why"),
    [
        (earlier().clear(), IDS, "the earlier table has none of its personas and scaffolds"),
        (earlier(questions=1172), IDS, "asked 50 questions, the earlier table's are of [1172]"),
        (earlier(), IDS[:10], "and only 10 questions that could be counted as such"),
    ],
)
def test_what_cannot_be_compared_is_not_passed(prior, readable, why):
    found = drift_audit(ROWS, prior, tolerance=0.5, readable=readable)
    assert (found.status, found.blocks) == ("unverifiable", False)
    assert found.observed.startswith(f"{CELL.key}: ")
    assert why in found.observed


def test_the_changed_anchor_is_named():
    found = drift_audit(ROWS, earlier(), tolerance=0.0, readable=IDS, changes=PUBLISHED_CHANGES)
    assert "'Answer: '" in found.remedy
    assert "'Answer:' and the letter" in found.remedy


@pytest.fixture(scope="module")
def published() -> Path:
    folder = os.environ.get(PRIOR_DIR)
    if not folder:
        pytest.skip(f"{PRIOR_DIR} names no folder with issue186_aggregate.json")
    return Path(folder) / "issue186_aggregate.json"


def test_the_published_table(published):
    frame = read_prior_table(published)
    assert frame.height == 39 * 11 * 4
    assert frame.n_unique(["cell", "persona", "scaffold"]) == frame.height
    assert frame["cell"].n_unique() == 39
    assert set(frame["questions"]) == {1172}
    # 22 of the questions could never be counted as correct.
    assert frame["correct"].max() == 1063 <= 1172 - 22
    worst = frame.sort("correct").row(0, named=True)
    assert worst == {
        "cell": "police_officer.persona_cot.42",
        "persona": "police_officer",
        "scaffold": "no_cot",
        "correct": 400,
        "questions": 1172,
    }


def test_a_cell_that_found_the_published_counts_does_not_drift(published):
    prior = read_prior_table(published).filter(cell="librarian.persona_cot.42")
    rows = []
    for persona, scaffold, correct in prior.select("persona", "scaffold", "correct").rows():
        # The 22 questions that were unreadable then are all answered correctly now.
        right = [i < correct or i >= 1150 for i in range(1172)]
        rows += [(persona, scaffold, f"q{i}", ok) for i, ok in enumerate(right)]
    frame = pl.DataFrame(
        rows, schema=["persona", "scaffold", "question_id", "is_correct"], orient="row"
    ).with_columns(cell=pl.lit("librarian.persona_cot.42"))
    readable = [f"q{i}" for i in range(1150)]
    found = drift_audit(frame, prior, tolerance=0.0, readable=readable, changes=PUBLISHED_CHANGES)
    assert found.status == "passed"
    assert found.details["questions_left_out"] == 22
    naive = drift_audit(frame, prior, tolerance=0.02, readable=[f"q{i}" for i in range(1172)])
    assert "accuracy differs by at most 0.0188" in naive.observed
