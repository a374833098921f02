"""The vocabulary figure draws the numbers it is given; the table of top words keeps their order."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import polars as pl
import pytest

from persona_assets.reporting.vocabulary_figure import interval_text, top_words, vocabulary_plot
from persona_assets.stats.lexicon import LEXICON_SCHEMA
from persona_assets.stats.vocabulary import VOCABULARY_SCHEMA, quantities
from persona_assets_tests.synthetic import small_study

STUDY = small_study()
SCAFFOLDS = ("generic_cot", "persona_cot")


def estimates() -> pl.DataFrame:
    """Every arm's and contrast's rows, all values different, on both axes."""
    rows = []
    for scaffold in SCAFFOLDS:
        for axis in ("source_loss", "bystander_leakage"):
            for quantity in quantities(STUDY):
                for scope in ("macro", *quantity.sources(STUDY)):
                    value = (len(rows) - 40) / 4000
                    rows.append(
                        dict.fromkeys(VOCABULARY_SCHEMA.names())
                        | {"quantity": quantity.kind, "name": quantity.name, "axis": axis}
                        | {"scaffold": scaffold, "scope": scope, "estimate": value}
                        | {"ci_low": value - 0.0013, "ci_high": value + 0.0011}
                    )
    return pl.DataFrame(rows, schema=VOCABULARY_SCHEMA, orient="row")


ESTIMATES = estimates()
BYSTANDERS = ESTIMATES.filter(quantity="increase", axis="bystander_leakage")


def bystander(arm: str, scaffold: str, scope: str = "macro") -> dict:
    (row,) = BYSTANDERS.filter(name=arm, scaffold=scaffold, scope=scope).iter_rows(named=True)
    return row


ROWS = [bystander(arm, scaffold) for arm in STUDY.arms for scaffold in SCAFFOLDS]


@pytest.fixture
def drawn(monkeypatch):
    """The figures as matplotlib held them when they were saved."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig

    def kept(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


def test_intervals_are_the_bystanders_increases(drawn):
    vocabulary_plot(ESTIMATES, STUDY)
    (axes,) = drawn[0].axes
    spans = [tuple(line.get_segments()[0][:, 0]) for line in axes.collections]
    assert spans == [(row["ci_low"], row["ci_high"]) for row in ROWS]
    squares = [line for line in axes.lines if line.get_markeredgecolor() in ("#0072b2", "#d55e00")]
    assert [line.get_xdata()[0] for line in squares] == [row["estimate"] for row in ROWS]
    texts = [text.get_text() for text in axes.texts]
    printed = [interval_text(row) for row in ROWS]
    assert [text for text in texts if text in printed] == printed


def test_square_is_filled_under_the_training_scaffold(drawn):
    vocabulary_plot(ESTIMATES, STUDY)
    squares = [line for line in drawn[0].axes[0].lines if line.get_marker() == "s"]
    squares = [line for line in squares if line.get_markerfacecolor() != "none"]
    filled = [line.get_markerfacecolor() != "white" for line in squares]
    expected = [STUDY.arm(row["name"]).scaffold.name == row["scaffold"] for row in ROWS]
    assert filled == expected
    assert 0 < sum(filled) < len(filled)


def test_sources_stand_below_the_macro_unless_there_is_one_only(drawn):
    vocabulary_plot(ESTIMATES, STUDY)
    (axes,) = drawn[0].axes
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    expected = [
        bystander(arm, scaffold, source)["estimate"]
        for arm in STUDY.arms
        if len(STUDY.shared_sources(arm, arm)) > 1
        for scaffold in SCAFFOLDS
        for source in STUDY.sources
    ]
    assert [line.get_xdata()[0] for line in hollow] == expected
    texts = [text.get_text() for text in axes.texts]
    single = [arm for arm in STUDY.arms if len(STUDY.shared_sources(arm, arm)) == 1]
    assert texts.count("librarian only") == len(single) == 2


def test_equal_numbers_give_equal_bytes_and_svg_is_self_contained():
    svg = vocabulary_plot(ESTIMATES, STUDY)
    assert vocabulary_plot(ESTIMATES[::-1], STUDY) == svg
    assert vocabulary_plot(ESTIMATES.with_columns(pl.col("ci_high") + 0.001), STUDY) != svg
    text = svg.decode("utf-8")
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    for active in ("<text", "<script", "font-family", "<dc:date>"):
        assert active not in text


def test_all_text_lies_within_the_canvas_and_apart(drawn):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    vocabulary_plot(ESTIMATES, STUDY)
    figure = drawn[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]
    boxes = {t: t.get_window_extent(renderer) for t in texts}
    assert len(boxes) > 30
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    placed = [(text, boxes[text]) for text in figure.axes[0].texts]
    for i, (text, box) in enumerate(placed):
        for other, beside in placed[:i]:
            assert not box.overlaps(beside), (text.get_text(), other.get_text())


def test_letters_are_readable_at_700_pixels(drawn):
    """At least 10.5 pixels tall when the figure is 700 pixels wide."""
    vocabulary_plot(ESTIMATES, STUDY)
    pixels_a_point = 700 / (drawn[0].get_figwidth() * 72)
    sizes = [text.get_fontsize() for text in drawn[0].axes[0].texts if text.get_text()]
    assert min(sizes) * pixels_a_point >= 10.5


def test_missing_rows_are_named():
    fewer = ESTIMATES.filter(
        ~((pl.col("name") == "garbage_cot") & (pl.col("scaffold") == "persona_cot"))
    )
    with pytest.raises(ValueError, match="garbage_cot under persona_cot has no macro increase"):
        vocabulary_plot(fewer, STUDY)


def test_top_words_are_the_first_by_rank():
    lexicon = pl.DataFrame(
        [
            ("comedian", rank, f"joke{rank}", 20.0 - rank, 1.0, 50 - rank, rank)
            for rank in range(1, 16)
        ]
        + [("librarian", 1, "<b>hush</b>", 2.5, 0.5, 9, 1)],
        schema=LEXICON_SCHEMA,
        orient="row",
    )
    table = top_words(lexicon[::-1], STUDY, shown=3)
    assert table == [
        {"source": "librarian", "n_words": 1, "words": ["<b>hush</b>"]}
        | {"z_first": 2.5, "z_last": 2.5},
        {"source": "comedian", "n_words": 15, "words": ["joke1", "joke2", "joke3"]}
        | {"z_first": 19.0, "z_last": 5.0},
    ]
