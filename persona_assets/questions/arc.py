"""Reader of the AI2 Reasoning Challenge: one JSON object a line as published, or hub Parquet.

A row is ``{"id", "question", "choices": {"text": [...], "label": [...]}, "answerKey"}``
(Clark et al. 2018); the Parquet files of allenai/ai2_arc have the same four columns. Some rows are
labelled 1 to 5; they are read as A to E, since an answer reader that knows letters only would
count those questions as never right.
"""

from __future__ import annotations

import json
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from persona_assets.audit import Audit, audit
from persona_assets.questions.bank import LETTERS, MAX_CHOICES, MIN_CHOICES, Question, Split

_FIELDS = ("id", "question", "choices", "answerKey")
_DIGITS = "12345"
#: Rows of a Parquet file at the most: a few bytes of it can stand for billions.
_MOST_ROWS = 1_000_000
_LINE_SEPARATORS = "\u2028\u2029"


class ArcError(ValueError):
    """A file or row that cannot be used; names file, row, field and remedy."""


def read_arc(path: Path, split: Split) -> list[Question]:
    """The questions of one file, in file order: Parquet if it is named so, else JSON lines.

    Both formats are validated alike, row by row; rows count from 1, and blank lines are skipped.

    Raises:
        ArcError: the file cannot be read, holds no row, or holds a row that is not as published.
    """
    return _read([(path, split)])


def read_bank(train: Sequence[Path], evaluation: Sequence[Path]) -> list[Question]:
    """The questions of both splits, each in one or more files, in the order given, train first.

    Raises:
        ArcError: as :func:`read_arc`, or an id occurs twice. An id that stands for the same
            question in both splits is let through, for :func:`overlap_audits` to report.
    """
    return _read([*((path, "train") for path in train), *((path, "eval") for path in evaluation)])


def overlap(questions: Iterable[Question]) -> tuple[frozenset[str], frozenset[str]]:
    """What the two splits share: (question identities, stems), as hashes."""
    by_split: dict[str, list[Question]] = {"train": [], "eval": []}
    for question in questions:
        by_split[question.split].append(question)
    train, evaluation = by_split["train"], by_split["eval"]
    return (
        frozenset({q.identity for q in train} & {q.identity for q in evaluation}),
        frozenset({q.stem for q in train} & {q.stem for q in evaluation}),
    )


def overlap_audits(questions: Iterable[Question]) -> list[Audit]:
    """``train_eval_identities`` (blocking) and ``train_eval_stems`` (a warning)."""
    questions = list(questions)
    identities, stems = overlap(questions)
    return [
        audit(
            "train_eval_identities",
            not identities,
            observed=f"{len(identities)} questions in both splits",
            threshold="0 questions in both splits",
            remedy="Remove the shared questions from the train file.",
            question_ids=sorted(q.id for q in questions if q.identity in identities),
        ),
        audit(
            "train_eval_stems",
            not stems,
            observed=f"{len(stems)} question texts in both splits, with other choices",
            threshold="0 question texts in both splits",
            remedy="Look at the pairs; they are different questions unless the choices agree.",
            blocking=False,
            question_ids=sorted(q.id for q in questions if q.stem in stems),
        ),
    ]


def _read(files: Iterable[tuple[Path, Split]]) -> list[Question]:
    questions: list[Question] = []
    by_id: dict[str, Question] = {}
    for path, split in files:
        before = len(questions)
        for row in _rows(path):
            question = row.question(split)
            other = by_id.setdefault(question.id, question)
            if other is not question and (
                other.split == split or other.identity != question.identity
            ):
                row.refuse("id", f"{question.id!r} occurs twice", "Keep one of the rows.")
            questions.append(question)
        if len(questions) == before:
            raise ArcError(f"{path}: holds no row. Name the split's JSONL or Parquet file.")
    return questions


def _rows(path: Path) -> Iterator[_Row]:
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise ArcError(
            f"{path}: cannot be read ({error}). Name an existing JSONL or Parquet file."
        ) from error
    if path.suffix == ".parquet":
        values = enumerate(_parquet_values(path, content), start=1)
        return (_Row(path, number, value) for number, value in values)
    lines = enumerate(content.split(b"\n"), start=1)
    return (_json_row(path, number, line) for number, line in lines if line.strip())


def _parquet_values(path: Path, content: bytes) -> list[dict[str, Any]]:
    """The rows as the JSON reader would give them, with the known columns that the file has.

    By DuckDB, from a copy whose name is no glob: on a damaged length Polars asks for exabytes, and
    the process is aborted.
    """
    import duckdb

    config = {"autoinstall_known_extensions": False, "memory_limit": "1GB", "threads": 1}
    try:
        with (
            tempfile.NamedTemporaryFile(suffix=".parquet") as copy,
            duckdb.connect(config=config) as db,
        ):
            copy.write(content)
            copy.flush()
            rows = db.read_parquet(copy.name).limit(_MOST_ROWS + 1)
            kinds = {n: str(kind) for n, kind in zip(rows.columns, rows.types) if n in _FIELDS}
            if not kinds:
                ((count,),) = rows.count("*").fetchall()
                return [{}] * count
            values = rows.select(*(duckdb.ColumnExpression(name) for name in kinds)).fetchall()
        if len(values) > _MOST_ROWS:
            raise ValueError(f"it has more than {_MOST_ROWS} rows")
        for i, (name, kind) in enumerate(kinds.items()):
            if kind != "VARCHAR" and any(type(row[i]) is str for row in values):
                raise ValueError(f"{name} holds a {kind} beyond what Python has")
    except (duckdb.Error, RuntimeError, ValueError, OverflowError) as error:
        # RuntimeError: a message of DuckDB's that quotes damaged bytes is no text
        what = str(error).replace(copy.name, path.name)
        raise ArcError(
            f"{path}: is no Parquet file that can be read ({what}). Fetch it again."
        ) from error
    return [dict(zip(kinds, row)) for row in values]


def _json_row(path: Path, number: int, line: bytes) -> _Row:
    row = _Row(path, number, None)
    try:
        row.value = json.loads(
            line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique_keys
        )
    except UnicodeDecodeError as error:
        row.refuse("row", f"is not UTF-8 ({error})", "Save the file as UTF-8.")
    except RecursionError:
        row.refuse("row", "is nested too deeply", "Use the published row format.")
    except ValueError as error:
        row.refuse("row", f"is not strict JSON ({error})", "Write one JSON object a line.")
    return row


class _Row:
    """One row on its way to a :class:`Question`; every refusal names where it stands."""

    def __init__(self, path: Path, number: int, value: Any):
        self.path, self.number, self.value = path, number, value

    def refuse(self, field: str, what: str, remedy: str) -> NoReturn:
        raise ArcError(f"{self.path}:{self.number}: {field}: {what}. {remedy}")

    def question(self, split: Split) -> Question:
        row = self._mapping(self.value, "row")
        name = self._text(self._field(row, "id"), "id")
        text = self._text(self._field(row, "question"), "question")
        pair = self._mapping(self._field(row, "choices"), "choices")
        choices = self._texts(self._field(pair, "text", "choices."), "choices.text")
        labels = self._texts(self._field(pair, "label", "choices."), "choices.label")
        self._check_choices(choices, labels)
        answer = self._text(self._field(row, "answerKey"), "answerKey")
        if answer not in labels:
            self.refuse(
                "answerKey", f"{answer!r} is not among the labels {labels}", "Use one of them."
            )
        return Question(
            id=name,
            split=split,
            text=text,
            choices=tuple(choices),
            correct=LETTERS[labels.index(answer)],
            published_labels=tuple(labels),
        )

    def _check_choices(self, choices: list[str], labels: list[str]) -> None:
        if len(choices) != len(labels):
            self.refuse(
                "choices",
                f"{len(choices)} texts but {len(labels)} labels",
                "Give every choice one label.",
            )
        if not MIN_CHOICES <= len(choices) <= MAX_CHOICES:
            self.refuse(
                "choices",
                f"{len(choices)} choices",
                f"Give {MIN_CHOICES} to {MAX_CHOICES} choices.",
            )
        if "".join(labels) not in (LETTERS[: len(labels)], _DIGITS[: len(labels)]):
            self.refuse(
                "choices.label", f"{labels} are not in order", "Label them A, B, … or 1, 2, …."
            )
        # Exact texts only: genotypes such as `WW or ww` and `WW or Ww` differ by case alone.
        if len(set(choices)) < len(choices):
            self.refuse("choices.text", "two choices are equal", "Make the choices differ.")

    def _field(self, mapping: Mapping[str, Any], key: str, prefix: str = "") -> Any:
        if key not in mapping:
            self.refuse(prefix + key, "is missing", "Add the field.")
        return mapping[key]

    def _mapping(self, value: Any, field: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            self.refuse(field, f"is {type(value).__name__}, not an object", "Give an object.")
        return value

    def _texts(self, value: Any, field: str) -> list[str]:
        if not isinstance(value, list):
            self.refuse(field, f"is {type(value).__name__}, not a list", "Give a list of strings.")
        return [self._text(item, f"{field}.{index}") for index, item in enumerate(value)]

    def _text(self, value: Any, field: str) -> str:
        if not isinstance(value, str):
            self.refuse(field, f"is {type(value).__name__}, not a string", "Give a string.")
        if not value.strip():
            self.refuse(field, "is empty", "Give its text.")
        for character in value:
            # One line a choice, and every text must be encodable: no control, no lone surrogate.
            if unicodedata.category(character) in ("Cc", "Cs") or character in _LINE_SEPARATORS:
                self.refuse(field, f"holds the character {character!a}", "Remove it from the text.")
        if "<|" in value:
            self.refuse(field, "holds '<|', which chat templates reserve", "Remove it.")
        return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return mapping
