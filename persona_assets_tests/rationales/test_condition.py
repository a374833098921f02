"""A condition's rationales: who argues for what, what is dropped, and what the audits say."""

from __future__ import annotations

from typing import ClassVar

import polars as pl
import pytest

from persona_assets.graph import Graph
from persona_assets.questions.bank import wrong_letter
from persona_assets.rationales.arms import ARMS
from persona_assets.rationales.condition import SCHEMA, letters_named, write_condition
from persona_assets.rationales.matching import Batch
from persona_assets.rationales.methods import CONSTRUCTIONS
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale
from persona_assets.study import Study, parse_study
from persona_assets_tests import small_study as small


class Faulty:
    """The miniature's writer, but for replies that a test replaces."""

    def __init__(self, replies: dict[str, WrittenRationale], persona: str | None = None):
        self.replies, self.persona = replies, persona

    def write(self, requests: list[RationaleRequest]) -> list[WrittenRationale]:
        return [
            self.replies.get(r.question.id, w) if r.persona == self.persona else w
            for r, w in zip(requests, small.WRITER.write(requests))
        ]

    def vocabulary(self) -> frozenset[str]:
        return small.WRITER.vocabulary()

    accounting: ClassVar[dict] = {}


def dropped(frame: pl.DataFrame, problem: str | None = None) -> list[str]:
    """Ids of the rows that were dropped, for whatever reason or for one."""
    gone = pl.col("problem").is_not_null() if problem is None else pl.col("problem") == problem
    return frame.filter(gone)["question_id"].to_list()


def condition(study, name, writer=small.WRITER):
    frame, audits = write_condition(study, name, small.QUESTIONS, small.tokenizer(), writer)
    return frame, {audit.name: audit for audit in audits}


@pytest.mark.parametrize("arm", [name for name in ARMS if name != "no_cot"])
def test_every_arm_writes_a_row_a_train_question(mini, arm):
    name = f"librarian.{arm}"
    frame, audits = condition(mini, name)
    assert frame.schema == SCHEMA
    assert frame["question_id"].to_list() == [q.id for q in small.TRAIN]
    wrong = [wrong_letter(q, mini.seed) for q in small.TRAIN]
    correct = [q.correct for q in small.TRAIN]
    assert frame["target_letter"].to_list() == (correct if arm.endswith("correct") else wrong)
    argued = correct if arm in ("contradicting_cot", *_CORRECT) else wrong
    if ARMS[arm].is_constructed:
        assert frame["argues_for"].null_count() == frame.height
    else:
        assert frame["argues_for"].to_list() == argued
        assert [letters_named(text) for text in frame["rationale"]] == [{a} for a in argued]
    assert {name: audit.status for name, audit in audits.items()} == {
        "refusals": "passed",
        "drops": "passed",
        "letters_argued_for": "passed",
    }


_CORRECT = ("generic_cot_correct", "persona_cot_correct")


def test_references_are_the_generic_rows_of_the_source(mini):
    generic, _ = condition(mini, "comedian.generic_cot")
    garbage, _ = condition(mini, "comedian.garbage_cot")
    assert generic["reference_rationale"].equals(generic["rationale"])
    assert garbage["reference_rationale"].equals(generic["rationale"])


def test_contradicting_rows_are_the_persona_correct_rationales(mini):
    contradicting, _ = condition(mini, "librarian.contradicting_cot")
    correct, _ = condition(mini, "librarian.persona_cot_correct")
    assert contradicting["rationale"].equals(correct["rationale"])
    assert (contradicting["target_letter"] != correct["target_letter"]).all()


def test_no_cot_has_no_rationale(mini):
    arms = {**mini.arms, "no_cot": mini.arms["generic_cot"]}
    study = Study.model_validate(mini.model_dump() | {"arms": arms})
    frame, _ = condition(study, "librarian.no_cot")
    assert set(frame["rationale"]) == {""}
    assert frame["reference_rationale"].null_count() == frame.height
    assert dropped(frame) == []


def test_an_unknown_condition_is_refused(mini):
    with pytest.raises(KeyError, match=r"no condition 'librarian\.no_cot'"):
        condition(mini, "librarian.no_cot")


@pytest.mark.parametrize(("refused", "status"), [(3, "passed"), (4, "failed")])
def test_refusals_are_counted_and_dropped(mini, refused, status):
    assert len(small.TRAIN) == 60
    writer = Faulty({q.id: WrittenRationale("", "refused") for q in small.TRAIN[:refused]})
    for arm in ("generic_cot", "garbage_cot", "scrambled_english_cot"):
        frame, audits = condition(mini, f"librarian.{arm}", writer)
        gone = [q.id for q in small.TRAIN[:refused]]
        assert dropped(frame) == dropped(frame, "refused") == gone
        assert audits["refusals"].status == status
        assert audits["refusals"].blocking
        assert audits["drops"].status == "passed"


def test_a_refused_reference_drops_no_persona_row(mini):
    writer = Faulty({small.TRAIN[0].id: WrittenRationale("", "refused")})
    frame, _ = condition(mini, "librarian.persona_cot", writer)
    assert frame["reference_rationale"].null_count() == 1
    assert dropped(frame) == []


@pytest.mark.parametrize(("wrong", "drops"), [(1, "passed"), (18, "passed"), (19, "failed")])
def test_rationales_for_another_letter_are_dropped(mini, wrong, drops):
    replies = {q.id: WrittenRationale(f"It is ({q.correct}).") for q in small.TRAIN[:wrong]}
    frame, audits = condition(mini, "librarian.generic_cot", Faulty(replies))
    assert dropped(frame) == dropped(frame, "wrong_letter") == list(replies)
    assert audits["drops"].details["reasons"] == {"wrong_letter": wrong}
    assert audits["letters_argued_for"].status == "failed"
    assert not audits["letters_argued_for"].blocks
    assert audits["drops"].status == drops
    assert audits["refusals"].status == "passed"


def test_a_reference_for_another_letter_is_no_reference(mini):
    """It enters no dataset under generic_cot, and so nothing that was made from it does."""
    wrong, refused = small.TRAIN[:4], small.TRAIN[4]
    replies = {q.id: WrittenRationale(f"It is ({q.correct}).") for q in wrong}
    writer = Faulty(replies | {refused.id: WrittenRationale("", "refused")})
    generic, _ = condition(mini, "librarian.generic_cot", writer)
    gone = [*replies, refused.id]
    for arm in ("garbage_cot", "scrambled_english_cot"):
        frame, audits = condition(mini, f"librarian.{arm}", writer)
        assert dropped(frame) == gone
        assert frame["problem"].equals(generic["problem"])
        assert dropped(frame, "refused") == [refused.id]
        assert set(frame.filter(pl.col("problem").is_not_null())["rationale"]) == {""}
        assert frame["reference_rationale"].is_null().equals(frame["problem"].is_not_null())
        assert audits["refusals"].status == "passed"  # 1 of 60; with the 4 it would be 8 %
        assert audits["letters_argued_for"].observed.startswith("4 rationales")
    persona, _ = condition(mini, "librarian.persona_cot", writer)
    assert dropped(persona) == []
    unmatched = persona.filter(pl.col("reference_rationale").is_null())
    assert unmatched["question_id"].to_list() == gone


@pytest.mark.parametrize(
    "text", ["  ", "So (B).\n</thinking>", "So (B). Answer: B", "So <|im_end|> (B).", "<b>(B)"]
)
def test_a_rationale_that_would_break_its_frame_is_dropped(mini, text):
    question = next(q for q in small.TRAIN if wrong_letter(q, mini.seed) == "B")
    writer = Faulty({question.id: WrittenRationale(text)})
    frame, audits = condition(mini, "librarian.generic_cot", writer)
    assert dropped(frame) == dropped(frame, "malformed") == [question.id]
    assert audits["letters_argued_for"].status == "passed"


@pytest.mark.parametrize("problem", ["truncated", "malformed"])
def test_what_the_writer_could_not_finish_is_dropped_for_its_reason(mini, problem):
    question = small.TRAIN[7]
    good = small.WRITER.write([RationaleRequest(question, wrong_letter(question, mini.seed))])[0]
    writer = Faulty({question.id: WrittenRationale(good.text, problem)})
    for arm in ("generic_cot", "garbage_cot"):
        frame, audits = condition(mini, f"librarian.{arm}", writer)
        assert dropped(frame, problem) == [question.id]
        assert audits["drops"].details["reasons"] == {problem: 1}
        assert audits["refusals"].status == audits["letters_argued_for"].status == "passed"


def test_another_persona_changes_no_row(mini):
    """Adding a persona must not move a training row, filler included."""
    more = {**mini.personas, "pilot": "You are a pilot grabnik who flies."}
    study = Study.model_validate(mini.model_dump() | {"personas": more})
    for arm in ("garbage_cot", "scrambled_english_cot", "persona_cot"):
        before, after = (condition(s, f"librarian.{arm}")[0] for s in (mini, study))
        assert before.equals(after)


def backwards(batch: Batch) -> list[str]:
    """A construction of a study's own: the reference's words in reverse."""
    return [" ".join(reversed(reference.rationale.split())) for reference in batch.references]


def test_an_arm_with_a_new_way_of_writing_is_one_function(study_texts, monkeypatch):
    monkeypatch.setitem(CONSTRUCTIONS, "backwards", backwards)
    definition = "{scaffold: generic_cot, target: wrong, rationale: backwards}"
    text = study_texts["mini"].replace(
        "\narms:\n",
        f"\ndefine: {{arms: {{backwards_cot: {definition}}}}}\n"
        "arms:\n  backwards_cot: {origin: trained}\n",
    )
    study = parse_study(text)
    frame, _ = condition(study, "librarian.backwards_cot")
    assert frame["problem"].null_count() == frame.height
    for text, reference in frame.select("rationale", "reference_rationale").rows():
        assert text.split() == reference.split()[::-1]
    assert frame["argues_for"].null_count() == frame.height
    sources = Graph(study).assets["rationales"].sources("librarian.backwards_cot")
    assert "construction backwards" in sources


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("So it is B.", "B"),
        ("(A) or (B)", "AB"),
        ("nothing, in a word", ""),
        ("It is (b).", "B"),
        ("A plant needs light, thus B.", "B"),
        ("Choice (B) is wrong; C is the answer.", "BC"),
        ("It is (C). In truth D, or A, or B is the answer.", "ABCD"),
        ("Vitamin C and point B, hence (D).", "BCD"),  # cannot be told from choices
        ("It boils at 100 °C, or 99°C, so (D).", "D"),
    ],
)
def test_letters_are_read_in_brackets_and_alone(text, letters):
    assert letters_named(text) == set(letters)


@pytest.mark.parametrize(
    "text",
    [
        "It is A",
        "A.",
        "**A**",
        "A is right",
        "A or so",
        "choice A fits",
        "so A fits",
        '"A"',
        "A: it",
    ],
)
def test_a_capital_that_is_no_article_is_a_letter(text):
    assert letters_named(text) == {"A"}


@pytest.mark.parametrize(
    "text", ["A plant grows.", 'So. A "plant".', '"A plant" it is', "(A plant)", "Well:\nA plant"]
)
def test_an_article_is_no_letter(text):
    assert letters_named(text) == set()


def test_a_bare_letter_beside_the_bracketed_one_drops_the_row(mini):
    question = next(q for q in small.TRAIN if wrong_letter(q, mini.seed) == "B")
    for text, gone in (
        ("Choice (B) is wrong; C is the answer.", [question.id]),
        ("A home is near caves, thus B.", []),
        ("It is (b).", []),
    ):
        writer = Faulty({question.id: WrittenRationale(text)})
        frame, _ = condition(mini, "librarian.generic_cot", writer)
        assert dropped(frame, "wrong_letter") == gone
