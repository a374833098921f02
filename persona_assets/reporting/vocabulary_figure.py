"""How vocabulary leakage is shown: the increases by arm, and each lexicon's first words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from persona_assets.reporting.style import (
    BLUE,
    GREEN,
    INK,
    LINE,
    MUTED,
    STYLE,
    VERMILLION,
    source_markers,
    svg_of,
)
from persona_assets.reporting.words import percent, signed
from persona_assets.stats.estimands import MACRO
from persona_assets.stats.lexicon import generating_scaffolds
from persona_assets.study import Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AXIS = "bystander_leakage"
_COLORS = (BLUE, VERMILLION, GREEN)
#: Heights of an arm's rows, in rows.
_STEP, _GAP = 0.62, 0.5
#: Of a share: effects are of the order of a word in a hundred.
DIGITS = 4


def vocabulary_plot(estimates: pl.DataFrame, study: Study) -> bytes:
    """The increase of each arm's lexicon share under the bystanders, with intervals, as SVG.

    One row an arm and generating scaffold; the square is filled where the arm was trained with
    the scaffold. Made to be read at a width of 700 pixels.

    Args:
        estimates: ``VOCABULARY_SCHEMA`` with the increases of every arm.
        study: The study, for the order of arms, scaffolds and sources.

    Raises:
        ValueError: an arm has no macro row under a generating scaffold.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    rows = list(_rows(estimates, study))
    height = rows[-1].y + 0.55
    with context(["default", STYLE]):
        figure = Figure(figsize=(7.2, 0.42 * (height + 0.85) + 1.25))
        inches = figure.get_figheight()
        axes = figure.add_axes((0.35, 1.2 / inches, 0.335, 1 - 1.25 / inches))
        axes.set_ylim(height, -0.85)
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for row in rows:
            _draw_row(axes, row, study)
        _labels(axes, rows, study)
        _legend(figure, study)
        return svg_of(figure)


@dataclass(frozen=True, slots=True)
class _Row:
    """An arm under a scaffold: its height ``y``, its colour and its estimates by scope."""

    arm: str
    scaffold: str
    y: float
    color: str
    trained_with: bool
    first_of_arm: bool
    values: dict[str, dict[str, Any]]

    @property
    def sources(self) -> list[str]:
        """The sources that the macro is over."""
        return [scope for scope in self.values if scope != MACRO]


def _rows(estimates: pl.DataFrame, study: Study) -> Iterator[_Row]:
    y = -_GAP - _STEP
    for arm in study.arms:
        y += _GAP
        for i, scaffold in enumerate(generating_scaffolds(study)):
            y += _STEP
            found = estimates.filter(
                quantity="increase", name=arm, scaffold=scaffold, axis=_AXIS
            ).iter_rows(named=True)
            values = {row["scope"]: row for row in found}
            if MACRO not in values:
                raise ValueError(f"{arm} under {scaffold} has no macro increase: estimate it first")
            trained_with = study.arm(arm).scaffold.name == scaffold
            color = _COLORS[i % len(_COLORS)]
            yield _Row(arm, scaffold, y, color, trained_with, i == 0, values)


def _draw_row(axes: Axes, row: _Row, study: Study) -> None:
    value = row.values[MACRO]
    axes.hlines(row.y, value["ci_low"], value["ci_high"], color=row.color, linewidth=2, zorder=3)
    axes.plot(
        value["estimate"],
        row.y,
        "s",
        color=row.color,
        markerfacecolor=row.color if row.trained_with else "white",
        markersize=4.2,
        zorder=4,
    )
    if len(row.sources) == 1:
        return
    for source, marker in source_markers(study):
        if own := row.values.get(source):
            axes.plot(
                own["estimate"],
                row.y + 0.23,
                marker,
                markersize=3.6,
                markerfacecolor="none",
                markeredgecolor=MUTED,
                markeredgewidth=0.8,
                zorder=2,
            )


def _labels(axes: Axes, rows: Sequence[_Row], study: Study) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.08)
    axes.set_xlabel("increase over the untrained model,\nshare of the words of a rationale")
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "clip_on": False}
    level = percent(study.inference.confidence)
    axes.text(1.05, -0.62, f"estimate [{level} interval]", color=MUTED, **place)
    axes.text(-0.05, -0.62, "under scaffold", color=MUTED, ha="right", **place)
    for row in rows:
        if row.first_of_arm:
            axes.text(-1.03, row.y, row.arm, weight="bold", fontsize=8.5, **place)
            if len(row.sources) == 1:
                only = f"{row.sources[0]} only"
                axes.text(-1.03, row.y + _STEP, only, color=MUTED, fontsize=8, **place)
        axes.text(-0.05, row.y, row.scaffold, color=row.color, fontsize=8.5, ha="right", **place)
        axes.text(1.05, row.y, interval_text(row.values[MACRO]), fontsize=8.5, **place)


def interval_text(row: Mapping[str, Any]) -> str:
    """An estimate and its interval, as figure and tables print them."""
    estimate, low, high = (signed(row[name], DIGITS) for name in ("estimate", "ci_low", "ci_high"))
    return f"{estimate} [{low}, {high}]"


def _legend(figure: Figure, study: Study) -> None:
    from matplotlib.lines import Line2D

    square = {"linestyle": "-", "linewidth": 2, "marker": "s", "markersize": 4.2, "color": INK}
    macro = [
        Line2D([], [], label="arm trained with this scaffold", **square),
        Line2D([], [], label="with another", markerfacecolor="white", **square),
    ]
    hollow = {"linestyle": "", "markerfacecolor": "none", "markeredgecolor": MUTED}
    sources = [
        Line2D([], [], marker=marker, markersize=4, label=source, **hollow)
        for source, marker in source_markers(study)
    ]
    for handles, inches in ((macro, 0.34), (sources, 0.08)):
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, inches / figure.get_figheight()),
            ncols=min(len(handles), 4),
            frameon=False,
            fontsize=8.5,
            borderpad=0,
            handletextpad=0.4,
            columnspacing=1.2,
        )


def top_words(lexicon: pl.DataFrame, study: Study, shown: int = 12) -> list[dict[str, Any]]:
    """The table of top words, one row a source in study order.

    Args:
        lexicon: ``LEXICON_SCHEMA``.
        shown: How many words to show.

    Returns:
        ``source``; ``n_words``, the size of its lexicon; ``words``, the first of it by rank, as
        the writer wrote them (lower-cased); ``z_first`` and ``z_last``, of the whole lexicon.
    """
    by_source = lexicon.sort("rank").partition_by("source", as_dict=True)
    return [
        {
            "source": source,
            "n_words": own.height,
            "words": own["word"].head(shown).to_list(),
            "z_first": own["z"][0],
            "z_last": own["z"][-1],
        }
        for source in study.sources
        if (own := by_source.get((source,))) is not None
    ]
