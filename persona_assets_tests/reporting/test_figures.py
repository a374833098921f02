"""Figures: equal bytes for equal numbers, one mark a number, nothing outside the canvas."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import polars as pl
import pytest

from persona_assets.questions.miniature import ALL_VOICES
from persona_assets.reporting.figures import forest_plot, loss_curve, loss_heatmap
from persona_assets.reporting.words import p_text, signed
from persona_assets_tests.synthetic import small_study

HEADLINE, PAIRS = "#0072b2", "#d55e00"


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


def macro(landed, contrast, scheme):
    (row,) = (
        landed.frames["contrasts"]
        .filter(contrast=contrast.name, axis=contrast.axis, scope="macro", scheme=scheme)
        .iter_rows(named=True)
    )
    return row


def test_forest_plot_draws_each_schemes_own_interval(landed, drawn):
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_hex

    forest_plot(landed.frames["contrasts"], landed.study)
    (axes,) = drawn[0].axes
    for scheme, color in (("question", HEADLINE), ("pairs", PAIRS)):
        spans = [
            tuple(segment[:, 0])
            for lines in axes.collections
            if isinstance(lines, LineCollection) and to_hex(lines.get_color()[0]) == color
            for segment in lines.get_segments()
        ]
        rows = [macro(landed, contrast, scheme) for contrast in landed.study.contrast_list]
        assert spans == [(row["ci_low"], row["ci_high"]) for row in rows]
    first, *_ = axes.lines
    assert list(first.get_xdata()) == [0, 0]


def test_forest_plot_prints_the_headline_numbers(landed, drawn):
    forest_plot(landed.frames["contrasts"], landed.study)
    texts = [text.get_text() for text in drawn[0].axes[0].texts]
    rows = [macro(landed, contrast, "question") for contrast in landed.study.contrast_list]
    ps = [p_text(row["p_holm"], 0.01) for row in rows]
    assert [text for text in texts if text in ps] == ps
    for row in rows:
        low, high = signed(row["ci_low"]), signed(row["ci_high"])
        assert f"{signed(row['estimate'])} [{low}, {high}]" in texts


def test_forest_plot_draws_margins_and_every_source(landed, drawn):
    forest_plot(landed.frames["contrasts"], landed.study)
    (axes,) = drawn[0].axes
    bands = [c.get_paths()[0].get_extents() for c in axes.collections if len(c.get_facecolor())]
    assert [(box.x0, box.x1) for box in bands] == [(-0.03, 0.03), (-0.05, 0.05)]
    hollow = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert len(hollow) == 8 * len(landed.study.sources)


def test_more_sources_than_markers_all_stand_in_the_legend(landed, drawn):
    personas = {name: voice.system_prompt for name, voice in list(ALL_VOICES.items())[:14]}
    study = small_study(personas=personas, sources=list(personas), arms=_all_sources())
    forest_plot(landed.frames["contrasts"], study)
    legend = [text.get_text() for box in drawn[0].legends for text in box.get_texts()]
    assert set(personas) <= set(legend)
    figure = drawn[0]
    figure.canvas.draw()
    for box in figure.legends:
        extent = box.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= figure.bbox.x1


def _all_sources():
    return {arm: {"origin": use.origin} for arm, use in small_study().arms.items()}


def test_heatmap_is_symmetric_and_its_text_readable(landed, drawn):
    from matplotlib.colors import to_rgb

    loss_heatmap(landed.frames["losses"], landed.study)
    panels = [axes for axes in drawn[0].axes if axes.images]
    largest = landed.frames["losses"].filter(scope="macro")["loss"].abs().max()
    assert len(panels) == 2
    for panel in panels:
        (image,) = panel.images
        assert (image.norm.vmin, image.norm.vmax) == (-largest, largest)
        grid = image.get_array()
        frames = {tuple(p.get_center().round()): p for p in panel.patches}
        assert len(frames) == grid.shape[0]
        assert len(panel.texts) == grid.size
        for text in panel.texts:
            x, y = text.get_position()
            assert text.get_text() == signed(grid[y, x])
            background = image.cmap(image.norm(grid[y, x]))[:3]
            assert contrast_ratio(to_rgb(text.get_color()), background) >= 4.5
            if frame := frames.get((x, y)):
                assert contrast_ratio(frame.get_edgecolor()[:3], background) >= 4.5


def test_heatmap_text_is_readable_all_along_the_scale(landed, drawn):
    """As many shades as there are values: the middle ones are the hard ones."""
    from matplotlib.colors import to_rgb

    frame = landed.frames["losses"]
    shades = pl.int_range(frame.height) / frame.height * 2 - 1
    loss_heatmap(frame.with_columns(loss=shades), landed.study)
    for panel in (axes for axes in drawn[0].axes if axes.images):
        (image,) = panel.images
        for text in panel.texts:
            x, y = text.get_position()
            background = image.cmap(image.norm(image.get_array()[y, x]))[:3]
            assert contrast_ratio(to_rgb(text.get_color()), background) >= 4.5


def contrast_ratio(one, other):
    """WCAG 2.2's contrast ratio of two sRGB colours."""

    def luminance(color):
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_loss_curve_is_deterministic():
    losses = [2.5, 1.5, 1.25, 1.0]
    assert loss_curve(losses) == loss_curve(tuple(losses))
    assert loss_curve(losses) != loss_curve([*losses[:-1], 1.1])


def test_equal_numbers_give_equal_bytes(landed, figures):
    again = {
        "forest_plot": forest_plot(landed.frames["contrasts"][::-1], landed.study),
        "loss_heatmap": loss_heatmap(landed.frames["losses"][::-1], landed.study),
    }
    assert again == {name: figures[name] for name in again}
    moved = landed.frames["losses"].with_columns(loss=pl.col("loss") + 0.01)
    assert loss_heatmap(moved, landed.study) != figures["loss_heatmap"]


@pytest.mark.parametrize("name", ["forest_plot", "loss_heatmap"])
def test_svg_is_self_contained(figures, name):
    text = figures[name].decode("utf-8")
    assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
    assert "<text" not in text
    assert "<script" not in text
    assert "font-family" not in text
    assert "<dc:date>" not in text


@pytest.mark.parametrize(("draw", "table"), [(forest_plot, "contrasts"), (loss_heatmap, "losses")])
def test_all_text_lies_within_the_canvas(landed, monkeypatch, draw, table):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    boxes = []
    save = Figure.savefig

    def measured(figure, *args, **kwargs):
        save(figure, *args, **kwargs)
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes.extend(
            (text.get_text(), text.get_window_extent(renderer), figure.bbox)
            for text in figure.findobj(Text)
            if text.get_text() and text.get_visible()
        )

    monkeypatch.setattr(Figure, "savefig", measured)
    draw(landed.frames[table], landed.study)
    assert len(boxes) > 20
    for text, box, canvas in boxes:
        assert canvas.x0 <= box.x0 < box.x1 <= canvas.x1, text
        assert canvas.y0 <= box.y0 < box.y1 <= canvas.y1, text


def test_missing_rows_are_named(landed):
    contrasts = landed.frames["contrasts"].filter(pl.col("hypothesis") != "H3")
    with pytest.raises(ValueError, match=r"contradicting_cot-generic_cot\.source_loss"):
        forest_plot(contrasts, landed.study)
    with pytest.raises(ValueError, match="persona_cot under no_cot has no source_loss"):
        loss_heatmap(
            landed.frames["losses"].filter(
                ~((pl.col("arm") == "persona_cot") & (pl.col("scaffold") == "no_cot"))
            ),
            landed.study,
        )
