"""ARC-like rows for tests, in the two formats that ARC is published in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import polars as pl

SCHEMA = pl.Schema(
    {
        "id": pl.String,
        "question": pl.String,
        "choices": pl.Struct({"text": pl.List(pl.String), "label": pl.List(pl.String)}),
        "answerKey": pl.String,
    }
)


def published(
    name: str, text: str, texts: Sequence[str], answer: str = "A", labels: str = "ABCDE"
) -> dict[str, Any]:
    """One row, as published."""
    return {
        "id": name,
        "question": text,
        "choices": {"text": list(texts), "label": list(labels[: len(texts)])},
        "answerKey": answer,
    }


def as_jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    """JSON lines, as on the authors' page."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_parquet(rows: Iterable[dict[str, Any]], schema: pl.Schema = SCHEMA) -> bytes:
    """A Parquet file, as on the hub."""
    file = BytesIO()
    pl.DataFrame(list(rows), schema=schema).write_parquet(file)
    return file.getvalue()
