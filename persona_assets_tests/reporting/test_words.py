"""Numbers and untrusted text as the report writes them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_assets.naming import listed
from persona_assets.reporting import markdown
from persona_assets.reporting.words import count, p_text, percent, signed, visible
from persona_assets_tests.markup import PARSER


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0204, "+0.020"), (-0.0166, "−0.017"), (0.0, "0.000"), (-0.0004, "0.000"), (1, "+1.000")],
)
def test_signed(value, text):
    assert signed(value) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (None, "–"),
        (0.00009, "< 0.0001"),
        (0.0001, "0.0001"),
        (1.0, "1.0000"),
        (0.01, "0.0100"),
        (0.01000049, "0.0100005"),
        (0.00999951, "0.0100"),
    ],
)
def test_p_text(p, text):
    assert p_text(p, 0.01) == text


@given(st.floats(1e-6, 1), st.sampled_from([0.05, 0.01, 0.005, 0.00003]))
def test_printed_p_stands_on_its_side_of_alpha(p, alpha):
    text = p_text(p, alpha)
    assert (text == "< 0.0001" and p < 0.0001) or (float(text) <= alpha) == (p <= alpha)


def test_counts_shares_and_lists():
    assert count(1234567) == "1\u00a0234\u00a0567"
    assert percent(0.95) == "95\u00a0%"
    assert percent(1 - 2 * 0.005) == "99\u00a0%"
    assert [listed(items) for items in ([], "a", "ab", "abc")] == ["", "a", "a and b", "a, b and c"]


def test_visible_shows_what_would_act():
    assert visible("a\x1b[31mb\x07\r\n\tc\u202ed\x7f é ü 中") == (
        "a\\u{1b}[31mb\\u{7}\\u{d}\n\tc\\u{202e}d\\u{7f} é ü 中"
    )


@given(st.text())
def test_visible_leaves_nothing_that_acts(text):
    assert all(c.isprintable() or c in "\n\t" or c.isspace() for c in visible(text))
    assert "\x1b" not in visible(text)


def one_line(text):
    return re.sub(r"[ \t\n]+", " ", visible(text))


@given(st.text(alphabet=st.sampled_from("<>&|`~*_[]()!\\#-+.:/= \n\tabc{}$\x1b")))
def test_inline_text_is_plain_text(text):
    (_, inline, _) = PARSER.parse("x" + markdown.inline(text) + "x")
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    rendered = "".join(token.content for token in inline.children)
    assert rendered == "x" + one_line(text) + "x"


@given(st.text(alphabet=st.sampled_from("<>`~ \nabc|\x1b&")))
def test_fenced_text_is_one_code_block(text):
    tokens = PARSER.parse("before\n\n" + markdown.fence(text) + "\n\nafter\n")
    fences = [token for token in tokens if token.type == "fence"]
    assert [token.content for token in fences] == [visible(text) + "\n"]
    assert tokens[-2].content == "after"


def test_inline_text_reads_well_unrendered():
    assert markdown.inline("p < 0.0001 & so on") == r"p \< 0.0001 \& so on"


@given(st.text(alphabet=st.sampled_from("`ab_* |"), min_size=1).filter(str.strip))
def test_code_spans_of_a_table_hold_their_text(text):
    tokens = PARSER.parse(f"| a | b |\n|---|---|\n| x {markdown.code(text)} | y |\n")
    _, _, inline, last = (token for token in tokens if token.type == "inline")
    assert last.content == "y"
    (span,) = (token.content for token in inline.children if token.type == "code_inline")
    assert span.strip() == one_line(text).strip()
