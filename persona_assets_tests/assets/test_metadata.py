"""Markdown that the interface shows: whatever a text holds, it is text there and nothing else."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.assets.metadata import table_preview
from persona_assets.assets.plots import letters_bars
from persona_assets.reporting.words import visible
from persona_assets_tests.markup import HOSTILE, cells_of


def preview(frame: pl.DataFrame) -> list[list[str]]:
    return cells_of(table_preview(frame)["preview"].value)


def one_line(text: str) -> str:
    return " ".join(visible(text).split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_the_text_of_its_one_cell(text):
    frame = pl.DataFrame({"rationale": [text, "after"], "choices": [[text], ["after"]]})
    assert preview(frame) == [
        ["rationale", "choices"],
        [one_line(text), one_line(str([text]))],
        ["after", "['after']"],
    ]


@given(st.text(alphabet=st.sampled_from("<>&|`~*_[]()!\\#-+.:/= \n\tabc{}$\x1b")))
def test_no_text_breaks_out_of_its_cell(text):
    # A mark before and after: how white space at a cell's ends is shown is of no account.
    head, (shown, letter) = preview(pl.DataFrame({"rationale": [f"x{text}x"], "letter": ["A"]}))
    assert (head, letter) == (["rationale", "letter"], "A")
    whole = f"x{text}x" if len(text) <= 78 else f"x{text[:78]}…"
    assert shown == " ".join(visible(whole).replace("\n", " ").replace("\t", " ").split())


@pytest.mark.parametrize("letter", HOSTILE)
def test_the_name_of_a_bar_is_text(letter):
    frame = pl.DataFrame({"predicted_letter": [letter, "A"]})
    rows = cells_of(letters_bars(frame, frame.clear())["predicted_letters"].value)
    assert sorted(name for name, *_ in rows[1:]) == sorted([one_line(letter), "A"])
    assert {tuple(bars) for _, *bars in rows[1:]} == {("█████░░░░░ 0.500", "░░░░░░░░░░ 0.000")}
