"""The number ledger: every number that the report prints, and how to recompute it.

A number's ``sql`` recomputes its value from the warehouse's outcome rows; where there is an
interval, ``sample_sql`` yields the integers that were resampled, from which estimator, B and seed
give interval and p exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import polars as pl

from persona_assets.naming import nearest

#: ``exact``: the SQL alone. ``bootstrap mean``: ``stats.bootstrap.bootstrap_mean`` of the sample;
#: ``bootstrap questions``: ``stats.vocabulary.bootstrap_questions``.
Estimator = Literal["exact", "bootstrap mean", "bootstrap questions"]

NUMBERS_SCHEMA = pl.Schema(
    {
        "number_id": pl.String,
        "value": pl.Float64,
        **dict.fromkeys(("ci_low", "ci_high", "confidence"), pl.Float64),
        **dict.fromkeys(("std_error", "p_value", "p_holm"), pl.Float64),
        "unit": pl.String,
        "n": pl.Int64,
        "formula": pl.String,
        "sql": pl.String,
        "sample_sql": pl.String,
        "rows_sql": pl.String,
        "estimator": pl.String,
        **dict.fromkeys(("divisor", "n_resamples", "rng_seed"), pl.Int64),
        "rng_stream": pl.String,
        "cells": pl.List(pl.String),
    }
)


@dataclass(frozen=True, slots=True)
class Number:
    """One number and its lineage.

    Attributes:
        number_id: Its name.
        value: What is printed, before rounding; equal to what ``sql`` returns, to the last bit.
        unit: What it is measured in.
        n: How many values it is made from: those that are resampled, or the rows counted.
        formula: How it is made, in words.
        sql: One query over the warehouse that returns one value.
        rows_sql: The rows of the warehouse behind it.
        cells: Keys of the cells it is made from; ``baseline`` for the untrained model.
        ci_low, ci_high: Its interval, of nominal coverage ``confidence``.
        std_error, p_value: Of the same resamples; the p-value is two-sided, of a zero mean.
        p_holm: The p-value adjusted over the registered family.
        sample_sql: The integers that are resampled, one a row, column ``value``.
        estimator: How interval and p are made.
        divisor: What one of those integers is divided by.
        n_resamples: B.
        rng_seed, rng_stream: What seeds the random stream: sha256 of the two.
    """

    number_id: str
    value: float
    unit: str
    n: int
    formula: str
    sql: str
    rows_sql: str
    cells: tuple[str, ...]
    ci_low: float | None = None
    ci_high: float | None = None
    confidence: float | None = None
    std_error: float | None = None
    p_value: float | None = None
    p_holm: float | None = None
    sample_sql: str | None = None
    estimator: Estimator = "exact"
    divisor: int | None = None
    n_resamples: int | None = None
    rng_seed: int | None = None
    rng_stream: str | None = None

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Number:
        """The number of a row of the ``numbers`` table."""
        return cls(**{**row, "cells": tuple(row["cells"])})


class UnknownNumber(KeyError):
    """There is no number of that name; suggests the nearest."""

    def __str__(self) -> str:
        return self.args[0]


class Ledger(Mapping[str, Number]):
    """The numbers of a study by id.

    Raises:
        ValueError: two numbers have one id.
    """

    def __init__(self, numbers: Iterable[Number]):
        self._numbers: dict[str, Number] = {}
        for number in numbers:
            if number.number_id in self._numbers:
                raise ValueError(f"two numbers are called {number.number_id!r}")
            self._numbers[number.number_id] = number

    @classmethod
    def from_frame(cls, frame: pl.DataFrame) -> Ledger:
        """The ledger of a frame with :data:`NUMBERS_SCHEMA`."""
        return cls(Number.from_row(row) for row in frame.iter_rows(named=True))

    def to_frame(self) -> pl.DataFrame:
        """One row a number (:data:`NUMBERS_SCHEMA`), in order."""
        rows = [{**asdict(number), "cells": list(number.cells)} for number in self.values()]
        return pl.DataFrame(rows, schema=NUMBERS_SCHEMA)

    def __getitem__(self, number_id: str) -> Number:
        """The number of that id.

        Raises:
            UnknownNumber: there is none; names the nearest.
        """
        try:
            return self._numbers[number_id]
        except KeyError:
            hint = nearest(number_id, self._numbers)
            raise UnknownNumber(f"no number {number_id!r}. {hint}".strip()) from None

    def __contains__(self, number_id: object) -> bool:
        return number_id in self._numbers  # Mapping's would look for the nearest to say it is not

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)
