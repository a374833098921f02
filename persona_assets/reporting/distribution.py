"""The plot of a distribution that an audit carries, as SVG bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_assets.audit import Distribution
from persona_assets.reporting.style import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    STYLE,
    VERMILLION,
    svg_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = (BLUE, VERMILLION, GREEN)
_LABELLED_UP_TO = 12


def distribution_plot(distribution: Distribution) -> bytes:
    """Bars, one a bin and series, with the limits that were asked for.

    The first series is filled; of numeric bins the others are outlines over it.

    Raises:
        ValueError: a series has not one bar a bin.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    n = len(distribution.bins) - (not _is_labelled(distribution))
    for name, values in distribution.series.items():
        if len(values) != n:
            raise ValueError(f"{distribution.title}: {name} has {len(values)} bars for {n} bins")
    with context(["default", STYLE]):
        figure = Figure(figsize=(6, 2.7))
        # A place fixed by hand: three plots a cell, and a layout engine doubles what one costs.
        axes = figure.add_axes((0.1, 0.27, 0.88, 0.63))
        (_labelled_bars if _is_labelled(distribution) else _numeric_bars)(axes, distribution)
        axes.set_title(distribution.title, fontsize=9.5, loc="left")
        axes.set(xlabel=distribution.axis, ylabel=distribution.counted)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=LINE, linewidth=0.5, alpha=0.6)
        axes.set_axisbelow(True)
        if len(distribution.series) > 1 or distribution.limits:
            figure.legend(loc="lower center", ncols=4, frameon=False, fontsize=8, borderpad=0.2)
        return svg_of(figure)


def _is_labelled(distribution: Distribution) -> bool:
    return any(isinstance(label, str) for label in distribution.bins)


def _labelled_bars(axes: Axes, distribution: Distribution) -> None:
    places = range(len(distribution.bins))
    width = 0.8 / len(distribution.series)
    few = len(distribution.bins) * len(distribution.series) <= _LABELLED_UP_TO
    for i, ((name, values), color) in enumerate(zip(distribution.series.items(), _COLORS)):
        shift = (i - (len(distribution.series) - 1) / 2) * width
        style = (
            {"color": color} if i == 0 else {"color": "white", "edgecolor": color, "hatch": "//"}
        )
        bars = axes.bar([p + shift for p in places], values, 0.92 * width, label=name, **style)
        if few:
            numbers = [f"{value:.4g}" for value in values]
            axes.bar_label(bars, numbers, padding=1, fontsize=8, color=INK)
    axes.set_xticks(list(places), distribution.bins)
    axes.margins(y=0.12)


def _numeric_bars(axes: Axes, distribution: Distribution) -> None:
    for i, ((name, values), color) in enumerate(zip(distribution.series.items(), _COLORS)):
        axes.stairs(
            values,
            distribution.bins,
            label=name,
            color=color,
            fill=i == 0,
            alpha=0.55 if i == 0 and len(distribution.series) > 1 else 1,
            linewidth=0 if i == 0 else 1.6,
            zorder=2 + i,
        )
    for i, limit in enumerate(distribution.limits):
        label = f"asked of {distribution.limits_of}" if i == 0 else None
        axes.axvline(limit, color=MUTED, linestyle="--", linewidth=1.2, label=label, zorder=6)
    axes.set_ylim(bottom=0)
