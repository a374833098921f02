"""Each audit where it passes and where exactly it fails."""

from __future__ import annotations

import math

import polars as pl
import pytest

from persona_assets.evaluation.diagnostics import (
    adapter_effect_audit,
    answers_parseable_audit,
    letter_collapse_audit,
    letter_mass_audit,
    predicted_letters,
)
from persona_assets.evaluation.outcomes import MEASURED
from persona_assets.questions.bank import LETTERS, Question
from persona_assets.reporting.distribution import distribution_plot
from persona_assets_tests.synthetic import bank, outcomes, small_study

STUDY = small_study()
CELL = STUDY.cells[0]
LOGPROBS = MEASURED["letter_logprobs"]


def four_choice(n: int) -> list[Question]:
    return [
        Question(
            id=f"q{i:02d}",
            split="eval",
            text=f"question {i}",
            choices=("a", "b", "c", "d"),
            correct=LETTERS[i % 4],
        )
        for i in range(n)
    ]


def entries(**logprobs: float) -> list[dict[str, object]]:
    return [{"key": key, "value": value} for key, value in logprobs.items()]


def with_letters(frame: pl.DataFrame, letters: list[str]) -> pl.DataFrame:
    """The rows with these predictions, and log-probabilities and marks that agree with them."""
    return frame.with_columns(
        pl.Series("predicted_letter", letters),
        pl.Series("is_correct", [a == b for a, b in zip(letters, frame["correct_letter"])]),
        pl.Series(
            "letter_logprobs",
            [
                entries(**{k: math.log(0.7 if k == letter else 0.05) for k in "ABCD"})
                for letter in letters
            ],
            LOGPROBS,
        ),
    )


# --- answers_parseable ---------------------------------------------------------------------------

BANK = bank(9)
ASKED = [q for q in BANK if q.split == "eval"]
ROWS = outcomes(STUDY, BANK, CELL, 0.5).with_columns(  # five letters of 0.7 and 4 × 0.1
    pl.col("letter_logprobs").list.eval(
        pl.struct(pl.element().struct.field("key"), value=pl.element().struct.field("value") - 0.1)
    )
)


def first_row(**changes: object) -> pl.DataFrame:
    """The rows, the first of them with other values."""
    return pl.concat(
        [
            ROWS.head(1).with_columns(
                pl.lit(pl.Series([value], dtype=ROWS.schema[name])).first().alias(name)
                for name, value in changes.items()
            ),
            ROWS[1:],
        ]
    )


def test_answers_to_questions_of_three_to_five_choices_can_be_read():
    found = answers_parseable_audit(ROWS, ASKED)
    assert (found.status, found.blocking) == ("passed", True)
    assert found.observed == "0 of 180 answers cannot be used"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"question_id": "other"}, "not a question of the bank"),
        (
            {"letter_logprobs": entries(A=-0.1, B=-3.0, C=-4.0, D=-5.0)},
            "scored letters are not the question's own",
        ),
        (
            {"letter_logprobs": entries(A=-0.1, B=math.nan, C=-4.0)},
            "a score is not a finite log-probability",
        ),
        (
            {"letter_logprobs": entries(A=-0.1, B=-math.inf, C=-4.0)},
            "a score is not a finite log-probability",
        ),
        (
            {"letter_logprobs": entries(A=-0.1, B=None, C=-4.0)},
            "a score is not a finite log-probability",
        ),
        (
            {"letter_logprobs": entries(A=0.1, B=-3.0, C=-4.0)},
            "a score is not a finite log-probability",
        ),
        (
            {"letter_logprobs": entries(A=-0.1, B=-0.2, C=-4.0)},
            "probabilities sum to more than 1",
        ),
        (
            {"letter_logprobs": entries(A=-2.0, B=-1.0, C=-4.0)},
            "prediction is not the best letter",
        ),
        ({"predicted_letter": "E"}, "prediction is not the best letter"),
        ({"predicted_letter": None}, "prediction is not the best letter"),
        ({"correct_letter": "C"}, "correct letter is not the bank's"),
        ({"is_correct": False}, "marked right or wrong against its letters"),
        ({"letter_logprobs": None}, "scored letters are not the question's own"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_with_its_fault(changes, fault):
    right = {
        "predicted_letter": "A",
        "is_correct": True,
        "letter_logprobs": entries(A=-0.1, B=-3.0, C=-4.0),
    }
    assert answers_parseable_audit(first_row(**right), ASKED).status == "passed"
    found = answers_parseable_audit(first_row(**right | changes), ASKED)
    assert found.blocks
    assert found.observed.startswith("1 of 180 answers cannot be used: ")
    assert found.details["faults"][fault] == 1
    persona, scaffold, question = ROWS.select("persona", "scaffold", "question_id").row(0)
    name = changes.get("question_id", question)
    assert found.details["rows"] == [f"{persona}/{scaffold}/{name}"]


def test_ties_go_to_the_first_letter():
    tie = entries(A=-3.0, B=-1.0, C=-1.0)
    for letter, status in (("B", "passed"), ("C", "failed")):
        row = first_row(predicted_letter=letter, is_correct=False, letter_logprobs=tie)
        assert answers_parseable_audit(row, ASKED).status == status


# --- letter_mass ---------------------------------------------------------------------------------


def test_letters_that_bear_the_probability_pass():
    found = letter_mass_audit(ROWS)
    assert (found.status, found.blocking) == ("passed", False)
    assert found.observed.startswith("0 of 180 answers have less than 0.5 of the probability")
    assert found.details["shares"] == {}
    assert sum(found.distribution.series["answers"]) == 180


def test_letters_that_bear_little_of_the_probability_are_a_warning():
    light = entries(A=math.log(0.3), B=math.log(0.1), C=math.log(0.05))
    found = letter_mass_audit(first_row(letter_logprobs=light))
    assert (found.status, found.blocks) == ("failed", False)
    persona, scaffold = ROWS.select("persona", "scaffold").row(0)
    assert f"at most 11.1% of a persona × scaffold's ({persona}/{scaffold}" in found.observed
    assert "least mass 0.45" in found.observed
    assert found.details["shares"] == {f"{persona}/{scaffold}": pytest.approx(1 / 9)}


def test_one_light_answer_in_twenty_is_allowed_and_two_are_not():
    questions = four_choice(20)
    frame = outcomes(STUDY, questions, CELL, 0.5)
    light = entries(A=math.log(0.3), B=-9.0, C=-9.0, D=-9.0)
    for n, status in ((1, "passed"), (2, "failed")):
        values = [light] * n + frame["letter_logprobs"].to_list()[n:]
        changed = frame.with_columns(pl.Series("letter_logprobs", values, LOGPROBS))
        assert letter_mass_audit(changed).status == status


# --- letter_collapse -----------------------------------------------------------------------------

FOUR = four_choice(40)
BASELINE = outcomes(STUDY, FOUR, None, 1.0)
GROUPS = BASELINE.select("persona", "scaffold").unique().height


def cell_predicting(letters: str) -> pl.DataFrame:
    """A cell that is right but for its first persona × scaffold, which predicts ``letters``."""
    frame = outcomes(STUDY, FOUR, CELL, 1.0)
    return with_letters(frame, [*letters, *frame["predicted_letter"].to_list()[len(letters) :]])


def test_entropy_is_of_the_predicted_letters():
    table = predicted_letters(cell_predicting("A" * 20 + "B" * 10 + "C" * 10))
    persona, scaffold = BASELINE.select("persona", "scaffold").row(0)
    row = table.filter(persona=persona, scaffold=scaffold).row(0, named=True)
    assert (row["answers"], row["letter"], row["share"]) == (40, "A", 0.5)
    assert row["entropy"] == pytest.approx(1.5)
    others = table.filter(~((pl.col("persona") == persona) & (pl.col("scaffold") == scaffold)))
    assert others["entropy"].to_list() == pytest.approx([2.0] * (GROUPS - 1))


@pytest.mark.parametrize(
    ("letters", "letter"), [("A" * 9 + "C" * 20 + "B" * 11, "C"), ("D" * 20 + "B" * 20, "B")]
)
def test_the_letter_is_the_most_predicted_and_the_first_of_equals(letters, letter):
    persona, scaffold = BASELINE.select("persona", "scaffold").row(0)
    table = predicted_letters(cell_predicting(letters)).filter(persona=persona, scaffold=scaffold)
    assert table.select("letter", "share").rows() == [(letter, 0.5)]


def test_a_cell_as_varied_as_the_baseline_passes():
    found = letter_collapse_audit(outcomes(STUDY, FOUR, CELL, 1.0), BASELINE)
    assert (found.status, found.blocking) == ("passed", False)
    assert found.details["collapsed"] == []
    assert found.details["questions_by_choices"] == {"4": 40}
    assert found.observed.startswith(f"{CELL.key}: 0 of {GROUPS} persona × scaffolds")


@pytest.mark.parametrize(
    ("letters", "collapsed"),
    [
        ("A" * 40, True),
        ("A" * 25 + "BCD" * 5, True),  # one letter in 0.625, the entropy is 0.77 of the baseline's
        ("A" * 24 + "BCD" * 5 + "B", False),  # one letter in 0.6
        ("AB" * 20, True),  # half the entropy, no letter in over half
        ("ABC" * 13 + "A", False),  # one letter never given: 0.79 of the entropy
        ("A" * 18 + "B" * 18 + "C" * 4, True),  # 0.68 of the entropy, no letter in over 0.45
    ],
)
def test_a_collapse_shows_in_entropy_or_in_one_letters_share(letters, collapsed):
    found = letter_collapse_audit(cell_predicting(letters), BASELINE)
    assert found.status == ("failed" if collapsed else "passed")
    assert not found.blocks
    assert len(found.details["collapsed"]) == collapsed


def test_a_collapse_names_cell_persona_scaffold_letter_and_share():
    frame = cell_predicting("A" * 40)
    persona, scaffold = frame.select("persona", "scaffold").row(0)
    found = letter_collapse_audit(frame, BASELINE)
    assert found.observed == (
        f"{CELL.key}: 1 of {GROUPS} persona × scaffolds have collapsed; the worst is "
        f"{persona}/{scaffold}: A in 100.0% of 40 answers, 0.00 bits against the baseline's 2.00"
    )
    assert found.details["collapsed"] == [
        {
            "persona": persona,
            "scaffold": scaffold,
            "answers": 40,
            "entropy": 0.0,
            "letter": "A",
            "share": 1.0,
            "baseline_entropy": 2.0,
        }
    ]
    assert found.distribution.series["this cell"][0] == 1
    assert found.distribution.series["baseline"][0] == 0
    assert sum(found.distribution.series["baseline"]) == GROUPS


def test_worst_collapse_comes_first():
    letters = "".join(["A" * 30 + "BC" * 5, "B" * 40, "AB" * 20])
    found = letter_collapse_audit(cell_predicting(letters), BASELINE)
    assert [(row["letter"], row["share"]) for row in found.details["collapsed"]] == [
        ("B", 1.0),
        ("A", 0.75),
        ("A", 0.5),
    ]
    assert "B in 100.0%" in found.observed


def test_an_entropy_as_low_as_the_baselines_own_is_no_collapse():
    same = with_letters(BASELINE, ["A", "B"] * (BASELINE.height // 2))
    cell = with_letters(outcomes(STUDY, FOUR, CELL, 1.0), same["predicted_letter"].to_list())
    assert letter_collapse_audit(cell, same).status == "passed"


def test_a_persona_that_the_baseline_lacks_cannot_pass():
    lacking = BASELINE.filter(pl.col("persona") != STUDY.sources[0])
    found = letter_collapse_audit(outcomes(STUDY, FOUR, CELL, 1.0), lacking)
    assert found.status == "failed"
    assert {row["persona"] for row in found.details["collapsed"]} == {STUDY.sources[0]}
    assert "the baseline has no such rows" in found.observed


def test_questions_are_counted_by_their_choices():
    found = letter_collapse_audit(ROWS, outcomes(STUDY, BANK, None, 0.5))
    assert found.details["questions_by_choices"] == {"3": 3, "4": 3, "5": 3}


# --- adapter_effect ------------------------------------------------------------------------------


def moved(frame: pl.DataFrame, by: float, rows: int | None = None) -> pl.DataFrame:
    """The first ``rows`` rows with each question's last letter moved by so many nats."""
    values = frame["letter_logprobs"].to_list()
    for letters in values[:rows]:
        letters[-1]["value"] -= by
    return frame.with_columns(pl.Series("letter_logprobs", values, LOGPROBS))


def test_a_checkpoint_that_moves_every_letter_is_applied():
    found = adapter_effect_audit(moved(BASELINE, 0.5), BASELINE, "bfloat16")
    assert (found.status, found.blocking) == ("passed", True)
    n = BASELINE.height
    assert found.observed.startswith(
        f"100.0% of {n} shared prompts move a letter by more than 0.05 nats (median 0.5)"
    )
    assert found.details["unchanged"] == {}
    assert dict(zip(found.distribution.bins, found.distribution.series["prompts"]))["1e0"] == n


def test_answers_of_the_base_itself_are_refused():
    found = adapter_effect_audit(BASELINE, BASELINE, "float32")
    assert found.blocks
    assert found.observed.startswith(f"0.0% of {BASELINE.height} shared prompts")
    assert found.distribution.series["prompts"][0] == BASELINE.height


@pytest.mark.parametrize(
    ("dtype", "by", "status"),
    [
        ("float32", 2.9e-6, "failed"),
        ("float32", 2e-4, "passed"),
        ("bfloat16", 0.037, "failed"),
        ("bfloat16", 0.06, "passed"),
    ],
)
def test_rounding_is_no_effect(dtype, by, status):
    assert adapter_effect_audit(moved(BASELINE, by), BASELINE, dtype).status == status


def test_a_persona_answered_by_the_base_is_found_and_named():
    personas = list(STUDY.personas)
    frame = pl.concat(
        [
            BASELINE.filter(persona=personas[-1]),
            moved(BASELINE.filter(pl.col("persona") != personas[-1]), 1.0),
        ]
    )
    found = adapter_effect_audit(frame, BASELINE, "float32")
    assert found.blocks
    assert found.details["unchanged"] == {
        f"{personas[-1]}/{scaffold}": 0.0 for scaffold in STUDY.scaffolds
    }
    assert f"least in {personas[-1]}/" in found.observed


@pytest.mark.parametrize(("every", "status"), [(20, "passed"), (19, "failed")])
def test_one_unchanged_prompt_in_twenty_is_allowed_wherever_it_is(every, status):
    spared = pl.int_range(pl.len()) % every == 0
    frame = pl.concat([BASELINE.filter(spared), moved(BASELINE.filter(~spared), 1.0)])
    found = adapter_effect_audit(frame, BASELINE, "float32")
    assert found.status == status
    assert found.blocks is (status == "failed")


@pytest.mark.parametrize(("spared", "status"), [(21, "failed"), (20, "passed")])
def test_one_persona_and_scaffold_answered_by_the_base_is_refused(spared, status):
    """Of 20 persona × scaffolds with 40 prompts one is enough, although 0.97 of all have moved."""
    by_base, rest = BASELINE[:spared], BASELINE[spared:]
    found = adapter_effect_audit(pl.concat([by_base, moved(rest, 1.0)]), BASELINE, "float32")
    assert found.status == status
    persona, scaffold = BASELINE.select("persona", "scaffold").row(0)
    assert found.details["unchanged"] == {f"{persona}/{scaffold}": 1 - spared / 40}


def test_a_persona_and_scaffold_with_few_shared_prompts_is_not_judged_alone():
    persona, scaffold = BASELINE.select("persona", "scaffold").row(0)
    group = (pl.col("persona") == persona) & (pl.col("scaffold") == scaffold)
    for kept, status in ((19, "passed"), (20, "failed")):
        frame = pl.concat([BASELINE.filter(group)[:kept], moved(BASELINE.filter(~group), 1.0)])
        assert adapter_effect_audit(frame, BASELINE, "float32").status == status


def test_rows_are_compared_where_the_prompt_is_the_same():
    other = pl.when(pl.col("stop_reason").is_not_null()).then(pl.lit("1" * 64))
    frame = BASELINE.with_columns(prompt_sha256=other.otherwise("prompt_sha256"))
    found = adapter_effect_audit(moved(frame, 1.0), BASELINE, "float32")
    shared = BASELINE.filter(pl.col("stop_reason").is_null()).height
    assert 0 < shared < BASELINE.height
    assert f"of {shared} shared prompts" in found.observed


def test_nothing_in_common_is_nothing_verified():
    frame = BASELINE.with_columns(prompt_sha256=pl.lit("1" * 64))
    found = adapter_effect_audit(frame, BASELINE, "float32")
    assert (found.status, found.blocks) == ("unverifiable", False)


def test_distributions_can_be_drawn():
    audits = [
        letter_mass_audit(BASELINE),
        letter_collapse_audit(cell_predicting("A" * 40), BASELINE),
        adapter_effect_audit(BASELINE, BASELINE, "float32"),
    ]
    for found in audits:
        assert distribution_plot(found.distribution).lstrip().startswith(b"<")
