"""Dataset audits: sound datasets pass all of them; each spoiled property fails exactly its own."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from persona_assets.questions.bank import LETTERS
from persona_assets.rationales.condition import filler_lexicon
from persona_assets.training.audits import audit_dataset
from persona_assets.training.encoding import ChatRow, encode_rows
from persona_assets_tests import small_study as small

GENERIC = "librarian.generic_cot_correct.42"
GARBAGE = "librarian.garbage_cot.42"
SCRAMBLED = "librarian.scrambled_english_cot.42"
CONTRADICTING = "librarian.contradicting_cot.42"


def statuses(mini, key: str, frame: pl.DataFrame | None = None, questions=None):
    cell = mini.cell(key)
    frame = small.dataset(mini, cell) if frame is None else frame
    lexicon = filler_lexicon(mini, small.QUESTIONS, small.tokenizer(), small.WRITER)
    audits = audit_dataset(
        frame,
        mini,
        cell,
        small.QUESTIONS if questions is None else questions,
        rationales=small.rationales(mini, cell.condition),
        tokenizer=small.tokenizer(),
        lexicon=lexicon,
    )
    assert all(a.blocking and a.observed and a.threshold and a.remedy for a in audits)
    return {a.name: a for a in audits}


def failures(mini, *args, **more) -> list[str]:
    return [n for n, a in statuses(mini, *args, **more).items() if a.status != "passed"]


def rewritten(frame: pl.DataFrame, index: int, **changes) -> pl.DataFrame:
    """``frame`` with one row changed and, if its text changed, encoded again."""
    rows = frame.to_dicts()
    row = rows[index] | changes
    (new,) = encode_rows(small.tokenizer(), [ChatRow(row["system"], row["user"], row["assistant"])])
    ids = {
        "input_ids": new.input_ids,
        "loss_start": new.loss_start,
        "loss_tokens": new.loss_tokens,
    }
    rows[index] = row | ids
    return pl.DataFrame(rows, schema=frame.schema)


def retargeted(frame: pl.DataFrame, index: int, letter: str) -> pl.DataFrame:
    turn = frame["assistant"][index][:-1] + letter
    return rewritten(frame, index, assistant=turn, target_letter=letter)


@pytest.mark.parametrize("key", [GENERIC, GARBAGE, SCRAMBLED, CONTRADICTING])
def test_a_sound_dataset_passes(mini, key):
    assert failures(mini, key) == []


def test_each_arm_has_the_audits_that_concern_it(mini):
    common = {
        "letter_balance",
        "answer_suffix",
        "encoding",
        "target_letters",
        "wrong_letter_identity",
        "train_eval_disjoint",
    }
    assert set(statuses(mini, CONTRADICTING)) == common | {"loss_token_parity"}
    assert set(statuses(mini, GARBAGE)) == common | {"loss_token_parity", "garbage_words"}
    assert set(statuses(mini, SCRAMBLED)) == common | {"loss_token_parity", "scrambled_words"}


@pytest.mark.parametrize(("key", "off"), [(GARBAGE, 3), (SCRAMBLED, 3)])
def test_a_constructed_row_too_long(mini, key, off):
    frame = small.dataset(mini, mini.cell(key))
    close, far = (
        frame.with_columns(
            reference_loss_tokens=pl.when(pl.col("position") == 5)
            .then(pl.col("loss_tokens") - n)
            .otherwise("reference_loss_tokens")
        )
        for n in (off - 1, off)
    )
    assert failures(mini, key, close) == []
    assert failures(mini, key, far) == ["loss_token_parity"]
    worst = statuses(mini, key, far)["loss_token_parity"].details["worst_row"]
    assert worst["question_id"] == frame["question_id"][5]
    assert worst["difference"] == off


@pytest.mark.parametrize(
    ("off", "failed"),
    [(4, []), (6, ["loss_token_parity"]), (-4, []), (-6, ["loss_token_parity"])],
)
def test_written_rows_too_long_or_short_on_average(mini, off, failed):
    """20 + off loss tokens a row against 20 (the false counts fail ``encoding`` as well)."""
    frame = small.dataset(mini, mini.cell(CONTRADICTING)).with_columns(
        reference_loss_tokens=pl.lit(20, pl.Int32), loss_tokens=pl.lit(20 + off, pl.Int32)
    )
    names = failures(mini, CONTRADICTING, frame)
    assert [name for name in names if name != "encoding"] == failed


def test_without_references_parity_fails(mini):
    frame = small.dataset(mini, mini.cell(GARBAGE))
    bare = frame.with_columns(reference_loss_tokens=pl.lit(None, pl.Int32))
    assert failures(mini, GARBAGE, bare) == ["loss_token_parity"]


def test_parity_of_carried_over_cells_is_unverifiable(mini):
    key = "librarian.persona_cot.42"
    parity = statuses(mini, key)["loss_token_parity"]
    assert (parity.status, parity.blocks) == ("unverifiable", False)
    assert failures(mini, key) == ["loss_token_parity"]


def test_unbalanced_letters(mini):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    kept = frame.filter(pl.col("target_letter") == "A")
    assert failures(mini, CONTRADICTING, kept) == ["letter_balance"]
    observed = statuses(mini, CONTRADICTING, kept)["letter_balance"]
    assert observed.observed.startswith(f"A {kept.height} of {kept.height / 3:.1f} expected")
    assert observed.details["counts"] == dict.fromkeys(LETTERS, 0) | {"A": kept.height}


def test_letter_balance_takes_three_and_five_choices(mini):
    """The statistic against its own formula for three questions of 3, 4 and 5 letters."""
    from persona_assets.rationales.arms import ARMS
    from persona_assets.training.audits import _letter_balance

    questions = [
        replace(small.TRAIN[i], id=str(n), choices=tuple("vwxyz"[:n]), correct="A")
        for i, n in enumerate((3, 4, 5))
    ]
    frame = pl.DataFrame({"question_id": ["3", "4", "5"], "target_letter": ["B", "B", "E"]})
    bank = {q.id: q for q in questions}
    found = _letter_balance(frame, ARMS["garbage_cot"], bank)
    assert found.status == "passed"
    assert found.observed.startswith(
        "B 2 of 1.1 expected, C 0 of 1.1 expected, D 0 of 0.6 expected, E 1 of 0.2 expected"
    )
    assert "3 degrees of freedom" in found.threshold


def test_text_after_the_answer(mini):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    # The tokenizer has no token for a line break or a stop: there, the ids are still sound.
    for spoiled, more in ((" moss", ["encoding"]), ("\n", []), (".", [])):
        turn = frame["assistant"][2] + spoiled
        names = failures(mini, CONTRADICTING, rewritten(frame, 2, assistant=turn))
        assert names == ["answer_suffix", *more]


def test_the_answer_of_another_letter(mini):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    other = next(c for c in "ABCD" if c != frame["target_letter"][2])
    turn = frame["assistant"][2][:-1] + other
    spoiled = rewritten(frame, 2, assistant=turn)
    assert failures(mini, CONTRADICTING, spoiled) == ["answer_suffix", "encoding"]


IDS, START, COUNT = pl.col("input_ids"), pl.col("loss_start"), pl.col("loss_tokens")


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": IDS.list.reverse()},
        {"loss_start": START - 1, "loss_tokens": COUNT + 1},
        {"loss_start": START + 1, "loss_tokens": COUNT - 1},
        {"loss_tokens": COUNT + 1},
        {"input_ids": IDS.list.head(IDS.list.len() - 1), "loss_tokens": COUNT - 1},
        {"input_ids": IDS.list.tail(IDS.list.len() - 1), "loss_start": START - 1},
    ],
    ids=["other ids", "early loss", "late loss", "other count", "no end of turn", "no beginning"],
)
def test_ids_or_mask_of_another_text(mini, changes):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    row = pl.col("position") == 7
    frame = frame.with_columns(
        pl.when(row).then(value).otherwise(name).alias(name) for name, value in changes.items()
    )
    assert failures(mini, CONTRADICTING, frame) == ["encoding"]
    found = statuses(mini, CONTRADICTING, frame)["encoding"]
    assert found.details["question_ids"] == [frame["question_id"][7]]


def test_rows_that_were_all_encoded_without_their_end_of_turn(mini, monkeypatch):
    """The audit must not rest on the code that it looks at."""

    def cut(tokenizer, rows):
        return [replace(r, input_ids=r.input_ids[:-1]) for r in encode_rows(tokenizer, rows)]

    for module in ("dataset", "encoding"):
        monkeypatch.setattr(f"persona_assets.training.{module}.encode_rows", cut)
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    assert "encoding" in failures(mini, CONTRADICTING, frame)


@pytest.mark.parametrize("key", [CONTRADICTING, GENERIC])
def test_the_correct_letter_in_a_wrong_arm_and_conversely(mini, key):
    frame = small.dataset(mini, mini.cell(key))
    correct = frame["correct_letter"][4]
    spoiled = correct if key == CONTRADICTING else next(c for c in "ABCD" if c != correct)
    assert failures(mini, key, retargeted(frame, 4, spoiled)) == ["target_letters"]


def test_another_wrong_letter_than_prescribed(mini):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    taken = {frame["correct_letter"][4], frame["target_letter"][4]}
    other = next(c for c in "ABCD" if c not in taken)
    spoiled = retargeted(frame, 4, other)
    assert failures(mini, CONTRADICTING, spoiled) == ["wrong_letter_identity"]
    found = statuses(mini, CONTRADICTING, spoiled)["wrong_letter_identity"]
    assert found.details["question_ids"] == [frame["question_id"][4]]
    assert found.observed.startswith("1 of 60 targets are not")


def test_a_question_of_the_eval_split(mini):
    frame = small.dataset(mini, mini.cell(CONTRADICTING))
    shared = next(q for q in small.TRAIN if q.id == frame["question_id"][9])
    questions = [*small.QUESTIONS, replace(shared, id="again", split="eval")]
    assert failures(mini, CONTRADICTING, frame, questions) == ["train_eval_disjoint"]


def swapped(frame: pl.DataFrame, index: int, old: str, new: str) -> pl.DataFrame:
    assert old in frame["assistant"][index]
    return rewritten(frame, index, assistant=frame["assistant"][index].replace(old, new, 1))


@pytest.mark.parametrize("intruder", ["eats", "B", "Moss"])
def test_a_word_or_letter_in_filler(mini, intruder):
    frame = small.dataset(mini, mini.cell(GARBAGE))
    word = frame["assistant"][3].split()[1]
    spoiled = swapped(frame, 3, word, intruder)
    assert failures(mini, GARBAGE, spoiled) == ["garbage_words"]


def test_garbage_without_a_lexicon_is_refused(mini):
    cell = mini.cell(GARBAGE)
    with pytest.raises(ValueError, match="need the lexicon"):
        audit_dataset(
            small.dataset(mini, cell),
            mini,
            cell,
            small.QUESTIONS,
            rationales=small.rationales(mini, cell.condition),
            tokenizer=small.tokenizer(),
        )


def test_other_words_or_the_same_order_in_a_scrambled_row(mini):
    cell = mini.cell(SCRAMBLED)
    frame = small.dataset(mini, cell)
    word = frame["assistant"][3].split()[1]
    assert failures(mini, SCRAMBLED, swapped(frame, 3, word, "moss")) == ["scrambled_words"]
    rationales = small.rationales(mini, cell.condition)
    texts = dict(rationales.select("question_id", "rationale").rows())
    references = dict(rationales.select("question_id", "reference_rationale").rows())
    name = frame["question_id"][3]
    unshuffled = swapped(frame, 3, texts[name], references[name])
    assert failures(mini, SCRAMBLED, unshuffled) == ["scrambled_words"]
