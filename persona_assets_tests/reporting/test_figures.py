"""Figures: equal bytes for equal numbers, one mark a number, nothing outside the canvas."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import polars as pl
import pytest

from persona_assets.reporting.figures import forest_plot, loss_heatmap


def test_equal_numbers_give_equal_bytes(landed, figures):
    again = {
        "forest_plot": forest_plot(landed.frames["contrasts"][::-1], landed.study),
        "loss_heatmap": loss_heatmap(landed.frames["losses"][::-1], landed.study),
    }
    assert again == figures
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
