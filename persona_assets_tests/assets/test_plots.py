"""Plots in letters: what they show, and that rows which a check will fail do not fail them."""

from __future__ import annotations

import math

import polars as pl
import pytest

from persona_assets.assets.plots import accuracy_bars, letters_bars, sparkline


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([3.0, 2.0, 1.0], "3.000 █▅▁ 1.000"),
        ([1.0, 1.0], "1.000 ▁▁ 1.000"),
        ([2.0, math.nan, 1.0], "2.000 █·▁ 1.000"),
        ([math.inf], "inf · inf"),
        ([], "no value"),
    ],
)
def test_a_line_of_blocks(values, shown):
    assert sparkline(values) == shown


def test_a_long_line_is_of_forty_means():
    falling = [float(i) for i in range(400, 0, -1)]
    first, blocks, last = sparkline(falling).split()
    assert (first, last, len(blocks)) == ("400.000", "1.000", 40)
    assert blocks == "".join(sorted(blocks, reverse=True))


def rows(*answers: tuple[str, bool | None, str | None, bool]) -> pl.DataFrame:
    schema = {
        "scaffold": pl.String,
        "is_source": pl.Boolean,
        "predicted_letter": pl.String,
        "is_correct": pl.Boolean,
    }
    return pl.DataFrame(answers, schema=schema, orient="row")


CELL = rows(
    ("no_cot", True, "A", True),
    ("no_cot", True, "B", False),
    ("no_cot", False, "A", True),
    ("generic_cot", False, None, False),
)
BASELINE = rows(("no_cot", None, "A", True), ("no_cot", None, "C", False))


def test_accuracies_by_scaffold_and_side():
    assert accuracy_bars(CELL)["accuracy"].value.splitlines() == [
        "| scaffold | source persona | other personas |",
        "| --- | --- | --- |",
        "| no\\_cot | █████░░░░░ 0.500 | ██████████ 1.000 |",
        "| generic\\_cot | – | ░░░░░░░░░░ 0.000 |",
    ]
    assert (
        accuracy_bars(BASELINE)["accuracy"].value.splitlines()[0] == "| scaffold | all personas |"
    )
    assert accuracy_bars(CELL.clear())["accuracy"].value.startswith("| scaffold |")


def test_letters_beside_the_baselines():
    assert letters_bars(CELL, BASELINE)["predicted_letters"].value.splitlines()[2:] == [
        "| A | █████░░░░░ 0.500 | █████░░░░░ 0.500 |",
        "| B | ██░░░░░░░░ 0.250 | ░░░░░░░░░░ 0.000 |",
        "| C | ░░░░░░░░░░ 0.000 | █████░░░░░ 0.500 |",
    ]
    assert "C" in letters_bars(CELL.clear(), BASELINE)["predicted_letters"].value
