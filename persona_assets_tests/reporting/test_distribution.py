"""The plot of a distribution: a bar a value, the limits where they are asked for."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from matplotlib.container import BarContainer
from matplotlib.patches import StepPatch

from persona_assets.reporting.distribution import distribution_plot
from persona_assets_tests.test_audit import DRAWN

LETTERS = replace(DRAWN, bins=["A", "B"], limits=[], limits_of="")


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


def legend(figure) -> list[str]:
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


def test_numeric_bins_are_steps_between_their_edges(drawn):
    distribution_plot(DRAWN)
    (figure,) = drawn
    (axes,) = figure.axes
    steps = [p.get_data() for p in axes.patches if isinstance(p, StepPatch)]
    assert [list(s.values) for s in steps] == list(DRAWN.series.values())
    assert all(list(s.edges) == DRAWN.bins for s in steps)
    assert [line.get_xdata()[0] for line in axes.lines] == DRAWN.limits
    assert legend(figure) == ["this arm", "reference arm", "asked of the mean"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens a row", "rows")


def test_labels_are_bars_beside_each_other(drawn):
    distribution_plot(LETTERS)
    (axes,) = drawn[0].axes
    bars = [c for c in axes.containers if isinstance(c, BarContainer)]
    assert [[b.get_height() for b in c] for c in bars] == list(LETTERS.series.values())
    assert [t.get_text() for t in axes.get_xticklabels()] == ["A", "B"]
    assert [t.get_text() for t in axes.texts] == ["3", "4", "0", "7"]
    spans = sorted((b.get_x(), b.get_x() + b.get_width()) for c in bars for b in c)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert not axes.lines


def test_one_series_without_limits_needs_no_legend(drawn):
    distribution_plot(replace(LETTERS, series={"rows": [3, 4]}))
    assert not drawn[0].legends


@pytest.mark.parametrize("distribution", [DRAWN, LETTERS])
def test_equal_values_give_equal_bytes(distribution):
    svg = distribution_plot(distribution)
    assert distribution_plot(replace(distribution)) == svg
    assert distribution_plot(replace(distribution, series={"rows": [4, 3]})) != svg


def test_a_series_of_another_length_is_refused():
    with pytest.raises(ValueError, match="tokens: rows has 3 bars for 2 bins"):
        distribution_plot(replace(DRAWN, series={"rows": [1, 2, 3]}))
