"""Audits of what the turns say: a spoiled text fails exactly the audit of what was spoiled."""

from __future__ import annotations

import random

import polars as pl
import pytest

from persona_assets.rationales.arms import ARMS
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale
from persona_assets.training.audit_text import Variety, lexical_variety, variety
from persona_assets.training.audited import AuditedDataset
from persona_assets_tests.training.material import (
    CONTEXT,
    CONTRADICTING,
    CORRECT,
    GARBAGE,
    GENERIC,
    PERSONA,
    SCRAMBLED,
    WRITTEN,
    matched,
)


@pytest.mark.parametrize("arm", [*WRITTEN, CONTEXT])
@pytest.mark.parametrize("instead", ["other side", "another", "none", "two", "bare"])
def test_a_rationale_for_another_letter(material, arm, instead):
    frame = material.dataset(arm)
    row = frame.row(3, named=True)
    (question,) = (q for q in material.train if q.id == row["question_id"])
    wrong = material.dataset("no_cot").filter(question_id=question.id)["target_letter"][0]
    for_correct = material.study.arm(arm).argues_for == "correct"
    ours, theirs = (question.correct, wrong) if for_correct else (wrong, question.correct)
    other = next(c for c in question.letters if c not in (ours, theirs))
    sign = {"other side": f"({theirs})", "another": f"({other})", "none": ""}
    sign |= {"two": f"({ours}) ({other})", "bare": f"({ours}) is wrong; {other} is the answer"}
    text = material.texts(frame, arm)[3]
    assert f"({ours})" in text
    text = text.replace(f"({ours})", sign[instead])
    spoiled, table = material.reworded(arm, {3: text})
    if arm == GENERIC:
        spoiled = matched(spoiled)
    found = material.only_failure("argued_letter", arm, spoiled, table)
    assert found.details["question_ids"] == [question.id]
    kind = {"other side": "prescribed wrong" if for_correct else "correct", "none": "none"}
    mine = "correct" if for_correct else "prescribed wrong"
    assert {k: n for k, n in found.details["argued_for"].items() if n} == {
        mine: frame.height - 1,
        kind.get(instead, "another"): 1,
    }


class Monotonous:
    """Says in one voice what another writer says to one request, but for the letter."""

    def __init__(self, writer, asked: RationaleRequest):
        self.writer, self.asked = writer, asked
        self.said = writer.write([asked])[0].text

    def write(self, requests):
        replies = self.writer.write(requests)
        said, sign = self.said, f"({self.asked.argues_for})"
        return [
            WrittenRationale(said.replace(sign, f"({r.argues_for})"))
            if r.persona == self.asked.persona
            else reply
            for r, reply in zip(requests, replies)
        ]

    def vocabulary(self):
        return self.writer.vocabulary()


def monotonous(material, persona: str | None):
    prompt = material.study.personas[persona] if persona else None
    asked = RationaleRequest(material.train[0], "A", persona, prompt)
    return material.with_writer(Monotonous(material.writer, asked))


@pytest.mark.parametrize(
    ("arm", "persona"), [(PERSONA, "librarian"), (CONTRADICTING, "librarian"), (GENERIC, None)]
)
def test_a_writer_that_says_the_same_to_all(material, arm, persona):
    spoiled = monotonous(material, persona)
    found = spoiled.only_failure("lexical_variety", arm)
    assert found.details["cell"]["distinct"] <= 5 / len(material.train)  # one a letter
    if arm == GENERIC:
        assert found.details["cell"] == found.details["reference"]


def test_filler_that_repeats_itself(material):
    frame = material.dataset(GARBAGE)
    first = material.texts(frame, GARBAGE)[0]
    spoiled, table = material.reworded(GARBAGE, dict.fromkeys(range(frame.height), first))
    assert material.failures(GARBAGE, matched(spoiled), table) == ["lexical_variety"]


@pytest.mark.parametrize(("repeated", "failed"), [(3, []), (4, ["lexical_variety"])])
def test_five_rows_in_a_hundred_may_be_alike(miniature, repeated, failed):
    """60 rows: 57 distinct rationales are 95 %."""
    frame = miniature.dataset(GARBAGE)
    first = miniature.texts(frame, GARBAGE)[0]
    texts = dict.fromkeys(range(1, repeated + 1), first)
    spoiled, table = miniature.reworded(GARBAGE, texts)
    assert miniature.failures(GARBAGE, matched(spoiled), table) == failed


def one_phrase(n: int) -> list[str]:
    """One phrase and a word of its own in each text: many types, few pairs of words."""
    return [f"a b c d e f g h own{i}" for i in range(n)]


def ten_words(n: int) -> list[str]:
    """Ten words in any order: few types, many pairs."""
    rng = random.Random(0)
    return [" ".join(rng.choices("abcdefghij", k=9)) for _ in range(n)]


@pytest.mark.parametrize(
    ("arm", "ours", "theirs", "status"),
    [
        (CONTRADICTING, ten_words, one_phrase, "failed"),
        (CONTRADICTING, one_phrase, ten_words, "failed"),
        (CONTRADICTING, one_phrase, one_phrase, "passed"),
        (GARBAGE, ten_words, one_phrase, "passed"),
        (GARBAGE, one_phrase, ten_words, "failed"),
    ],
)
def test_types_and_pairs_are_each_asked_for(miniature, arm, ours, theirs, status):
    """Of a constructed arm, pairs alone."""
    n = 60
    scaffold = ARMS[arm].scaffold
    ids = [str(i) for i in range(n)]
    turns = [f"{scaffold.opening}{scaffold.close(text)} A" for text in ours(n)]
    cell = miniature.study.cell(f"librarian.{arm}.42")
    found = lexical_variety(
        AuditedDataset(
            pl.DataFrame({"question_id": ids, "assistant": turns}),
            miniature.study,
            cell,
            [],
            pl.DataFrame({"question_id": ids, "reference_rationale": theirs(n)}),
            miniature.tokenizer,
            miniature.writer,
        )
    )
    assert found.status == status
    assert found.details["cell"]["distinct"] == 1


def test_variety_by_hand():
    found = variety(["One two, one TWO.", "three"])
    assert found.type_token_ratio == 3 / 5
    assert found.bigram_entropy == pytest.approx(0.9182958)  # of 2/3 and 1/3, in bits
    assert found.distinct == 1
    assert variety(["a b", "a b"]).distinct == 0.5
    assert variety([]) == Variety(0, 0, 0)


@pytest.mark.parametrize("arm", [CONTRADICTING, CORRECT, CONTEXT])
def test_characters_that_the_tokenizer_has_no_token_for(material, arm):
    frame = material.dataset(arm)
    texts = material.texts(frame, arm)
    words = {i: f"{material.unknown} {text.split(' ', 1)[1]}" for i, text in enumerate(texts)}
    few = material.reworded(arm, {3: words[3]})
    assert material.failures(arm, *few) == []
    found = material.audits(arm, *few)["byte_fallback"]
    assert found.details["worst_row"]["question_id"] == frame["question_id"][3]
    n = found.details["worst_row"]["no text"]
    assert n == len(material.tokenizer(material.unknown)["input_ids"])
    assert dict(zip(found.distribution.bins, found.distribution.series["rows"])) == {
        str(i): 0 for i in range(n)
    } | {"0": frame.height - 1, str(n): 1}
    assert material.failures(arm, *material.reworded(arm, words)) == ["byte_fallback"]


@pytest.mark.parametrize(
    "intruder", ["word", "B", "Capitalised", "camelCase", "\u24b7", "\u200b", "<b>"]
)
def test_a_word_or_letter_in_filler(material, intruder):
    frame = material.dataset(GARBAGE)
    texts = material.texts(frame, GARBAGE)
    word = material.word.title()
    new = {"word": material.word, "Capitalised": word, "camelCase": f"zq{word}Zq"}
    new = new.get(intruder, intruder)
    spoiled = {3: f"{texts[3]} {new} {new}", 4: f"{texts[4]} {new}"}
    if intruder == "B":
        spoiled[3] += " C"
    frame, table = material.reworded(GARBAGE, spoiled)
    frame = matched(frame)
    found = material.only_failure("garbage_words", GARBAGE, frame, table)
    assert found.details["question_ids"] == frame["question_id"][3:5].to_list()
    worst = list(found.details["worst_rows"].items())
    assert {name for name, _ in worst} == set(found.details["question_ids"])
    assert len(worst[0][1]) >= len(worst[1][1]) > 0


def test_other_words_or_the_same_order_in_a_scrambled_row(material):
    frame = material.dataset(SCRAMBLED)
    name, text = frame["question_id"][3], material.texts(frame, SCRAMBLED)[3]
    row = material.rationales(SCRAMBLED).filter(question_id=name)
    reference = row["reference_rationale"][0]
    words = text.split()
    for other in (
        " ".join([material.word, *words[1:]]),
        " ".join(words[1:]),
        f"{text} {words[0]}",
        reference,
    ):
        spoiled, table = material.reworded(SCRAMBLED, {3: other})
        spoiled = matched(spoiled)
        found = material.only_failure("scrambled_words", SCRAMBLED, spoiled, table)
        assert found.details["question_ids"] == [name]
