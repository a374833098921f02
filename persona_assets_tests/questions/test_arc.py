"""The ARC reader: what it reads, what it refuses, and what the published files hold."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_assets.questions.arc import ArcError, overlap, overlap_audits, read_arc, read_bank
from persona_assets.questions.bank import Question, content_hash
from persona_assets_tests.questions.published import SCHEMA, as_jsonl, as_parquet, published


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
    with pytest.raises(ArcError, match="JSONL or Parquet file"):
        read_arc(make(tmp_path), "train")


def test_shards_are_one_bank_and_ids_unique_in_it(tmp_path):
    def shard(name: str, *rows: dict) -> Path:
        (tmp_path / name).write_bytes(as_parquet(rows))
        return tmp_path / name

    one = shard("train-0.parquet", published("Q2", "Two?", "ab"), published("Q1", "One?", "ab"))
    two = shard("train-1.parquet", published("Q3", "Three?", "ab"))
    test = shard("test-0.parquet", published("Q4", "Four?", "ab"))
    bank = read_bank([one, two], [test])
    assert [(q.id, q.split) for q in bank] == [
        ("Q2", "train"),
        ("Q1", "train"),
        ("Q3", "train"),
        ("Q4", "eval"),
    ]
    again = shard("train-2.parquet", published("Q5", "Five?", "ab"), published("Q1", "One?", "ab"))
    with pytest.raises(ArcError, match=r"train-2\.parquet:2: id: 'Q1' occurs twice"):
        read_bank([one, again], [test])
    other = shard("test-1.parquet", published("Q1", "Another?", "ab"))
    with pytest.raises(ArcError, match=r"test-1\.parquet:1: id: 'Q1' occurs twice"):
        read_bank([one], [other])
    with pytest.raises(ArcError, match=r"empty\.parquet: holds no row"):
        read_bank([one, shard("empty.parquet")], [test])


def test_a_row_in_both_splits_is_left_to_the_overlap_check(tmp_path):
    path = written(tmp_path, row())
    identities, _ = overlap_audits(read_bank([path], [path]))
    assert identities.blocks
    assert identities.details["question_ids"] == ["Q1", "Q1"]


def parquet_file(folder: Path, frame: pl.DataFrame) -> Path:
    path = folder / "arc.parquet"
    frame.write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("column", "values", "refusal"),
    [
        ("id", pl.Series([3]), "id: is int, not a string"),
        ("id", pl.Series([b"Q1"]), "id: is bytes, not a string"),
        ("id", pl.Series([datetime(2018, 3, 14)]), "id: is datetime, not a string"),
        ("question", pl.Series([None]), "question: is NoneType, not a string"),
        ("choices", pl.Series(["heat"]), "choices: is str, not an object"),
        (
            "choices",
            pl.Series([[{"text": "heat", "label": "A"}]]),
            "choices: is list, not an object",
        ),
        ("choices", pl.Series([{"text": ["heat"]}]), "choices.label: is missing"),
        (
            "choices",
            pl.Series([{"text": "heat", "label": "A"}]),
            "choices.text: is str, not a list",
        ),
        (
            "choices",
            pl.Series([{"text": ["heat", None], "label": ["A", "B"]}]),
            "choices.text.1: is NoneType, not a string",
        ),
    ],
)
def test_a_column_of_another_type_is_refused(tmp_path, column, values, refusal):
    frame = pl.DataFrame([row()], schema=SCHEMA).with_columns(values.alias(column))
    path = parquet_file(tmp_path, frame)
    with pytest.raises(ArcError) as error:
        read_arc(path, "train")
    assert str(error.value).startswith(f"{path}:1: {refusal}. ")


@pytest.mark.parametrize("dtype", [pl.Datetime("us"), pl.Datetime("ms"), pl.Date])
def test_a_value_that_python_cannot_hold_is_refused(tmp_path, dtype):
    far = pl.Series("id", [2**62 if dtype != pl.Date else 2**30]).cast(dtype)
    path = parquet_file(tmp_path, pl.DataFrame([row()], schema=SCHEMA).with_columns(far))
    with pytest.raises(ArcError) as error:
        read_arc(path, "train")
    assert str(error.value).startswith(f"{path}: is no Parquet file that can be read (")


@pytest.mark.parametrize("column", list(SCHEMA))
def test_a_missing_column_is_refused(tmp_path, column):
    path = parquet_file(tmp_path, pl.DataFrame([row()], schema=SCHEMA).drop(column))
    with pytest.raises(ArcError) as error:
        read_arc(path, "train")
    assert str(error.value) == f"{path}:1: {column}: is missing. Add the field."


def test_a_table_of_something_else_is_refused(tmp_path):
    path = parquet_file(tmp_path, pl.DataFrame({"text": ["a"]}))
    with pytest.raises(ArcError, match=r"arc\.parquet:1: id: is missing"):
        read_arc(path, "train")


def test_other_columns_do_no_harm(tmp_path):
    frame = pl.DataFrame([row()], schema=SCHEMA).with_columns(split=pl.lit("train"))
    (question,) = read_arc(parquet_file(tmp_path, frame), "eval")
    assert (question.id, question.split) == ("Q1", "eval")


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(40) + b"PAR1", as_jsonl([row()])]
)
def test_what_is_no_parquet_file_is_refused(tmp_path, content):
    path = tmp_path / "arc.parquet"
    path.write_bytes(content)
    with pytest.raises(ArcError) as error:
        read_arc(path, "train")
    assert str(error.value).startswith(f"{path}: is no Parquet file that can be read (")
    assert str(error.value).endswith("Fetch it again.")


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


#: Texts as they come, and what each rule refuses.
_ODD = st.sampled_from([None, "", "  ", "a\nb", "\x00", "a\u2028b", "<|im_end|>", "A", "1", "é"])
_VALID = st.builds(
    lambda name, text, texts, labels, index: published(
        name, text, texts, labels[index % len(texts)], labels
    ),
    st.sampled_from(["Q1", "Q2", "Q3"]) | _TEXT,
    _TEXT,
    st.lists(_TEXT, min_size=2, max_size=5, unique=True),
    st.sampled_from(["ABCDE", "12345"]),
    st.integers(0, 4),
)
_CHOICES = st.none() | st.fixed_dictionaries(
    {key: st.none() | st.lists(_ODD | _TEXT, max_size=6) for key in ("text", "label")}
)
_SPOILED = st.builds(
    lambda row, spoiled: row | spoiled,
    _VALID,
    st.fixed_dictionaries(
        {}, optional={"id": _ODD, "question": _ODD, "choices": _CHOICES, "answerKey": _ODD}
    ),
)


def outcome(path: Path, content: bytes) -> tuple[str, object]:
    """(content hash, questions), or the refusal less the file's name."""
    path.write_bytes(content)
    try:
        questions = read_arc(path, "train")
    except ArcError as error:
        return "refused", str(error).removeprefix(str(path))
    return content_hash(questions), questions


@_FOLDER
@given(st.lists(_VALID, min_size=1, max_size=4, unique_by=lambda row: row["id"]))
def test_both_formats_give_the_same_questions(tmp_path, rows):
    jsonl = outcome(tmp_path / "arc.jsonl", as_jsonl(rows))
    assert jsonl[0] != "refused"
    assert outcome(tmp_path / "arc.parquet", as_parquet(rows)) == jsonl


@_FOLDER
@given(st.lists(_VALID | _SPOILED, max_size=4), st.sampled_from([None, *SCHEMA]))
def test_both_formats_refuse_the_same_rows_alike(tmp_path, rows, missing):
    rows = [{key: value for key, value in row.items() if key != missing} for row in rows]
    schema = pl.Schema({key: dtype for key, dtype in SCHEMA.items() if key != missing})
    jsonl = outcome(tmp_path / "arc.jsonl", as_jsonl(rows))
    assert outcome(tmp_path / "arc.parquet", as_parquet(rows, schema)) == jsonl


_PARQUET = as_parquet([published("Q1", "Why?", ["heat", "cold", "dark"])])


@_FOLDER
@given(st.integers(0, len(_PARQUET) - 1).map(lambda end: _PARQUET[:end]) | st.binary())
def test_a_cut_parquet_file_is_refused(tmp_path, content):
    path = tmp_path / "arc.parquet"
    path.write_bytes(content)
    with pytest.raises(ArcError) as error:
        read_arc(path, "eval")
    assert str(error.value).startswith(f"{path}: is no Parquet file that can be read (")


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


def test_the_published_files_as_parquet(arc_dir, tmp_path):
    for name in ("ARC-Challenge-Train", "ARC-Challenge-Test"):
        content = (arc_dir / f"{name}.jsonl").read_bytes()
        rows = [json.loads(line) for line in content.splitlines()]
        jsonl = outcome(tmp_path / "arc.jsonl", content)
        assert jsonl[0] != "refused"
        assert outcome(tmp_path / "arc.parquet", as_parquet(rows)) == jsonl


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
