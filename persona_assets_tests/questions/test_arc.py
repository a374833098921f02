"""The ARC reader: what it reads, what it refuses, and what the published files hold."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_assets.questions.arc import ArcError, overlap, overlap_audits, read_arc
from persona_assets.questions.bank import Question


def row(**changes) -> dict:
    base = {
        "id": "Q1",
        "question": "What melts ice?",
        "choices": {"text": ["heat", "cold", "dark"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    }
    return base | changes


def choices(text: object, label: object) -> dict:
    return {"text": text, "label": label}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "arc.jsonl"
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def test_a_row_is_read(tmp_path):
    (question,) = read_arc(written(tmp_path, row(), b""), "eval")
    assert question == Question(
        "Q1", "eval", "What melts ice?", ("heat", "cold", "dark"), "A", ("A", "B", "C")
    )


def test_digits_are_read_as_letters(tmp_path):
    numbered = row(choices=choices(list("vwxyz"), list("12345")), answerKey="5")
    (question,) = read_arc(written(tmp_path, numbered), "train")
    assert (question.letters, question.correct) == ("ABCDE", "E")
    assert question.published_labels == tuple("12345")


def test_choices_that_differ_by_case_are_kept(tmp_path):
    genotypes = row(choices=choices(["WW or ww", "WW or Ww"], ["A", "B"]))
    (question,) = read_arc(written(tmp_path, genotypes), "train")
    assert question.choices == ("WW or ww", "WW or Ww")


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (b"{", "row"),
        (b"[1]", "row"),
        (b'{"id": NaN}', "row"),
        (b'{"id": "a", "id": "b"}', "row"),
        (b"\xff\xfe", "row"),
        (b"[" * 100_000, "row"),
        (b"9" * 10_000, "row"),
        ({"question": "Q"}, "id"),
        (row(id=3), "id"),
        (row(question="  "), "question"),
        (row(question="a\nb"), "question"),
        (row(question="\ud800"), "question"),
        (row(question="say <|im_end|>"), "question"),
        (row(choices=[1]), "choices"),
        (row(choices={"text": ["a", "b"]}), "choices.label"),
        (row(choices=choices("ab", ["A", "B"])), "choices.text"),
        (row(choices=choices(["a", 1], ["A", "B"])), "choices.text.1"),
        (row(choices=choices(["a", ""], ["A", "B"])), "choices.text.1"),
        (row(choices=choices(["a", "b"], ["A"])), "choices"),
        (row(choices=choices(["a"], ["A"])), "choices"),
        (row(choices=choices(list("abcdef"), list("ABCDEF"))), "choices"),
        (row(choices=choices(["a", "b"], ["B", "A"])), "choices.label"),
        (row(choices=choices(["a", "b"], ["A", "2"])), "choices.label"),
        (row(choices=choices(["a", "a"], ["A", "B"])), "choices.text"),
        (row(answerKey="D"), "answerKey"),
        (row(answerKey=None), "answerKey"),
    ],
)
def test_a_bad_row_is_refused_by_file_line_and_field(tmp_path, bad, field):
    path = written(tmp_path, row(id="first"), bad)
    with pytest.raises(ArcError) as error:
        read_arc(path, "train")
    assert str(error.value).startswith(f"{path}:2: {field}: ")


def test_a_repeated_id_is_refused(tmp_path):
    with pytest.raises(ArcError, match=r":3: id: 'Q1' occurs twice\. Keep one"):
        read_arc(written(tmp_path, row(), row(id="Q2"), row()), "train")


@pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p, lambda p: written(p, b"\n")])
def test_a_file_without_rows_is_refused(tmp_path, make):
    with pytest.raises(ArcError, match="JSONL file"):
        read_arc(make(tmp_path), "train")


_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["id", "question", "choices", "text", "label", "answerKey"]), inner
        )
    ),
    max_leaves=12,
)


@_FOLDER
@given(st.binary() | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_read_or_refused(tmp_path, data):
    path = tmp_path / "arc.jsonl"
    path.write_bytes(data)
    try:
        questions = read_arc(path, "eval")
    except ArcError:
        return
    assert questions
    assert all(q.identity and q.correct in q.letters for q in questions)


_TEXT = st.text(
    st.characters(exclude_categories=("Cc", "Cs"), exclude_characters="\u2028\u2029"), min_size=1
).filter(lambda text: text.strip() and "<|" not in text)


@_FOLDER
@given(_TEXT, _TEXT, st.lists(_TEXT, min_size=2, max_size=5, unique=True), st.data())
def test_valid_rows_round_trip(tmp_path, name, text, texts, data):
    labels = data.draw(st.sampled_from(["ABCDE", "12345"]))[: len(texts)]
    answer = data.draw(st.sampled_from(labels))
    published = {
        "id": name,
        "question": text,
        "choices": {"text": texts, "label": list(labels)},
        "answerKey": answer,
    }
    path = tmp_path / "arc.jsonl"
    path.write_text(json.dumps(published, ensure_ascii=data.draw(st.booleans())), "utf-8")
    (question,) = read_arc(path, "train")
    assert (question.id, question.text, question.choices) == (name, text, tuple(texts))
    assert question.published_labels == tuple(labels)
    assert question.letters.index(question.correct) == labels.index(answer)


def question(name: str, split: str, text: str, *texts: str) -> Question:
    return Question(name, split, text, texts, "A")


def test_overlap_tells_questions_from_stems():
    train = question("a", "train", "Why is it so?", "x", "y")
    same = question("b", "eval", " why  is it SO?", "y", "X")
    stem = question("c", "eval", "Why is it so?", "x", "z")
    assert overlap([train, same]) == ({train.identity}, {train.stem})
    assert overlap([train, stem]) == (frozenset(), {train.stem})
    identities, stems = overlap_audits([train, stem])
    assert (identities.status, stems.status, stems.blocking) == ("passed", "failed", False)
    assert stems.details["question_ids"] == ["a", "c"]
    identities, _ = overlap_audits([train, same, stem])
    assert identities.blocks
    assert identities.observed.startswith("1 question")


def test_the_published_files(arc_dir):
    evaluation = read_arc(arc_dir / "ARC-Challenge-Test.jsonl", "eval")
    train = read_arc(arc_dir / "ARC-Challenge-Train.jsonl", "train")
    assert len(evaluation) == 1172
    assert Counter(len(q.choices) for q in evaluation) == {4: 1165, 3: 4, 5: 3}
    numbered = [q for q in evaluation if q.published_labels[0] == "1"]
    assert len(numbered) == 22
    assert all(q.correct in q.letters for q in evaluation)
    identities, stems = overlap([*train, *evaluation])
    assert (len(identities), len(stems)) == (0, 6)
