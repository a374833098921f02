"""How far two engines agree: planted disagreements are found, and listed with both sides."""

from __future__ import annotations

import polars as pl
import pytest

from benchmarks.engine_agreement import Material, compare, pack, read
from persona_assets.evaluation.outcomes import MEASURED
from persona_assets.questions.bank import Question


def answer(number: int, generated: bool) -> dict:
    return {
        "persona": "librarian",
        "scaffold": "generic_cot" if generated else "no_cot",
        "question_id": f"q{number}",
        "correct_letter": "A",
        "predicted_letter": "B",
        "is_correct": False,
        "letter_logprobs": [{"key": "A", "value": -2.0}, {"key": "B", "value": -1.0}],
        "rationale": f"moss {number}" if generated else "",
        "rationale_tokens": 2 if generated else 0,
        "stop_reason": "tag" if generated else None,
        "truncated": False,
        "prompt_sha256": f"{number} {generated}",
    }


ROWS = [answer(number, generated) for number in range(5) for generated in (False, True)]


def frame(rows: list[dict]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=MEASURED)


def changed(at: int, **changes: object) -> pl.DataFrame:
    return frame([row | (changes if i == at else {}) for i, row in enumerate(ROWS)])


def test_equal_answers_agree_in_any_order():
    found = compare(frame(ROWS), frame(ROWS[::-1]))
    assert (found.rows, found.same_letter, found.same_rationale, found.same_stop) == (10, 1, 1, 1)
    assert (found.largest, found.mean, found.listed) == (0, 0, [])


def test_another_letter_is_found_and_listed_with_both_distributions():
    other = [{"key": "A", "value": -1.0}, {"key": "B", "value": -1.5}]
    found = compare(frame(ROWS), changed(4, predicted_letter="A", letter_logprobs=other))
    assert found.same_letter == 0.9
    assert (found.same_rationale, found.same_stop) == (1, 1)
    assert found.largest == 1.0
    assert found.mean == pytest.approx(1.5 / 20)
    (listed,) = found.listed
    assert (listed["question_id"], listed["scaffold"]) == ("q2", "no_cot")
    assert (listed["predicted_letter"], listed["predicted_letter_other"]) == ("B", "A")
    assert listed["letter_logprobs"] == ROWS[4]["letter_logprobs"]
    assert listed["letter_logprobs_other"] == other


def test_another_rationale_and_another_stop_are_shares_of_what_was_generated():
    """Log-probabilities after another text are no disagreement of their own."""
    far = [{"key": "A", "value": -9.0}, {"key": "B", "value": -1.0}]
    text = changed(3, rationale="ferns", prompt_sha256="another", letter_logprobs=far)
    found = compare(frame(ROWS), text)
    assert (found.same_letter, found.same_rationale, found.same_stop) == (1, 0.8, 1)
    assert found.largest == 0
    assert [row["rationale_other"] for row in found.listed] == ["ferns"]
    found = compare(frame(ROWS), changed(3, stop_reason="length"))
    assert (found.same_letter, found.same_rationale, found.same_stop) == (1, 1, 0.8)
    assert [row["stop_reason_other"] for row in found.listed] == ["length"]


def test_answers_to_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="answered other prompts"):
        compare(frame(ROWS), frame(ROWS[:-1]))


def test_what_is_packed_is_read_again_with_its_own_files(tmp_path):
    for name in ("base", "tokenizer", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        (tmp_path / name / "manifest.json").write_text("the store's")
    question = Question("q", "eval", "Which?", ("moss", "ferns"), "B")
    material = Material(
        tmp_path / "base",
        tmp_path / "tokenizer",
        (tmp_path / "one", tmp_path / "two"),
        {"villain": "You plot."},
        (question,),
        7,
    )
    pack(material, tmp_path / "packed")
    found = read(tmp_path / "packed")
    assert (found.personas, found.questions, found.max_rationale_tokens) == (
        {"villain": "You plot."},
        (question,),
        7,
    )
    assert list(found.checkpoints) == ["base", "one", "two"]
    for folder in (found.base, found.tokenizer, *found.adapters):
        assert folder.is_relative_to(tmp_path / "packed")
        assert [file.name for file in folder.iterdir()] == ["config.json"]
        assert (folder / "config.json").read_text() == folder.name
