"""The report's figures, as SVG bytes that are equal for equal numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from persona_assets.reporting.words import AXIS_WORDS, p_text, signed
from persona_assets.stats.contrasts import HEADLINE_SCHEME, MACRO
from persona_assets.stats.losses import AXES
from persona_assets.study import Contrast, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADLINE, _PAIRS, _MARGIN = BLUE, VERMILLION, GREEN
_SOURCES_A_LINE, _LEGEND_LINE = 6, 0.22  # entries, inches


def forest_plot(contrasts: pl.DataFrame, study: Study) -> bytes:
    """The registered contrasts as SVG: both schemes' intervals, per-source estimates, margins.

    Args:
        contrasts: ``CONTRASTS_SCHEMA`` with every registered contrast.
        study: The study, for order, hypotheses and equivalence margins.

    Raises:
        ValueError: a registered contrast has no macro row.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    rows = list(_forest_rows(contrasts, study))
    height = rows[-1].y + 1
    with context(["default", STYLE]):
        below = 0.83 + _LEGEND_LINE * _source_lines(study)
        figure = Figure(figsize=(10.6, 0.62 * height + 0.45 + below))
        inches = figure.get_figheight()
        axes = figure.add_axes((0.307, below / inches, 0.434, 1 - (below + 0.28) / inches))
        axes.set_ylim(height, -0.55)
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for row in rows:
            _draw_margins(axes, row)
            _draw_row(axes, row, study)
        _forest_labels(axes, rows, study)
        _forest_legend(figure, rows, study)
        return svg_of(figure)


@dataclass(frozen=True, slots=True)
class _ForestRow:
    """One contrast on the plot: its height ``y`` and its rows by (scope, scheme)."""

    contrast: Contrast
    y: float
    first_of_hypothesis: bool
    values: dict[tuple[str, str], dict]

    @property
    def headline(self) -> dict:
        return self.values[MACRO, HEADLINE_SCHEME]


def _forest_rows(contrasts: pl.DataFrame, study: Study) -> Iterator[_ForestRow]:
    y, previous = -1.0, None
    for contrast in study.contrast_list:
        found = contrasts.filter(contrast=contrast.name, axis=contrast.axis)
        values = {(row["scope"], row["scheme"]): row for row in found.iter_rows(named=True)}
        if (MACRO, HEADLINE_SCHEME) not in values:
            raise ValueError(f"the contrast {contrast.key} has no macro row: estimate it first")
        first = contrast.hypothesis != previous
        y += 1.0 if not first or previous is None else 1.35
        previous = contrast.hypothesis
        yield _ForestRow(contrast, y, first, values)


def _draw_margins(axes: Axes, row: _ForestRow) -> None:
    for test in row.contrast.equivalence:
        axes.fill_betweenx(
            [row.y - 0.44, row.y + 0.44],
            -test.margin,
            test.margin,
            color=_MARGIN,
            alpha=0.16,
            linewidth=0,
            zorder=0,
        )


def _draw_row(axes: Axes, row: _ForestRow, study: Study) -> None:
    for scheme, color, shift, width in (
        (HEADLINE_SCHEME, _HEADLINE, -0.13, 2.4),
        ("pairs", _PAIRS, 0.08, 1.4),
    ):
        value = row.values[MACRO, scheme]
        y = row.y + shift
        axes.hlines(y, value["ci_low"], value["ci_high"], color=color, linewidth=width, zorder=3)
        axes.plot(value["estimate"], y, "s", color=color, markersize=2.6 * width**0.8, zorder=4)
    for source, marker in source_markers(study):
        if value := row.values.get((source, HEADLINE_SCHEME)):
            axes.plot(
                value["estimate"],
                row.y + 0.3,
                marker,
                markersize=4,
                markerfacecolor="none",
                markeredgecolor=MUTED,
                markeredgewidth=0.9,
                zorder=2,
            )


def _forest_labels(axes: Axes, rows: Sequence[_ForestRow], study: Study) -> None:
    level = f"{study.inference.confidence:.0%}"
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", color=LINE, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.06)
    axes.set_xlabel(f"difference of mean losses, under the scaffold {study.inference.scaffold}")
    place = {"transform": axes.get_yaxis_transform(), "va": "center", "clip_on": False}
    axes.text(1.03, -0.62, f"estimate [{level} interval]", color=MUTED, **place)
    axes.text(1.55, -0.62, "Holm p", color=MUTED, ha="right", **place)
    for row in rows:
        if row.first_of_hypothesis:
            axes.text(-0.685, row.y - 0.13, row.contrast.hypothesis, weight="bold", **place)
        name = f"{row.contrast.a} − {row.contrast.b}"
        axes.text(-0.59, row.y - 0.16, name, fontsize=8, **place)
        words = AXIS_WORDS[row.contrast.axis]
        axes.text(-0.59, row.y + 0.18, words, color=MUTED, fontsize=8, **place)
        value = row.headline
        interval = (
            f"{signed(value['estimate'])} [{signed(value['ci_low'])}, {signed(value['ci_high'])}]"
        )
        axes.text(1.03, row.y - 0.13, interval, fontsize=8.5, **place)
        p = p_text(value["p_holm"], study.inference.family_alpha)
        axes.text(1.55, row.y - 0.13, p, fontsize=8.5, ha="right", **place)


def _forest_legend(figure: Figure, rows: Sequence[_ForestRow], study: Study) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    schemes = [
        Line2D(
            [], [], color=_HEADLINE, linewidth=2.4, marker="s", label="questions drawn (headline)"
        ),
        Line2D(
            [], [], color=_PAIRS, linewidth=1.4, marker="s", markersize=3.4, label="pairs drawn"
        ),
    ]
    margins = sorted({test.margin for row in rows for test in row.contrast.equivalence})
    if margins:
        label = "equivalence margins " + ", ".join(f"±{margin:g}" for margin in margins)
        schemes.append(Patch(color=_MARGIN, alpha=0.25, linewidth=0, label=label))
    hollow = {"linestyle": "", "markerfacecolor": "none", "markeredgecolor": MUTED}
    sources = [
        Line2D([], [], marker=marker, markersize=4.5, label=source, **hollow)
        for source, marker in source_markers(study)
    ]
    # Many sources take several lines, which the axes leave room for (see forest_plot).
    for handles, inches in ((schemes, 0.05 + _LEGEND_LINE * _source_lines(study)), (sources, 0.05)):
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(0.5, inches / figure.get_figheight()),
            ncols=min(len(handles), _SOURCES_A_LINE),
            frameon=False,
            fontsize=8,
            borderpad=0,
        )


def _source_lines(study: Study) -> int:
    return -(-len(study.sources) // _SOURCES_A_LINE)


def loss_heatmap(losses: pl.DataFrame, study: Study) -> bytes:
    """Arm × scaffold mean losses on both axes as SVG; the arm's training scaffold is framed.

    Args:
        losses: ``LOSSES_SCHEMA`` with every arm and scaffold of the study.
        study: The study, for the order of arms and scaffolds.

    Raises:
        ValueError: an arm × scaffold has no macro row.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    values = {
        (row["axis"], row["arm"], row["scaffold"]): row["loss"]
        for row in losses.filter(scope=MACRO).iter_rows(named=True)
    }
    for axis in AXES:
        for arm in study.arms:
            for scaffold in study.scaffolds:
                if (axis, arm, scaffold) not in values:
                    raise ValueError(f"{arm} under {scaffold} has no {axis}: make the matrix first")
    limit = max((abs(value) for value in values.values()), default=0) or 1.0
    with context(["default", STYLE]):
        width = 2 + max(8, 1.3 * len(study.scaffolds))
        figure = Figure(figsize=(width, 0.42 * len(study.arms) + 2.0), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        panels = figure.subplots(1, 2, sharey=True)
        for panel, axis in zip(panels, AXES, strict=True):
            image = _draw_matrix(panel, study, axis, values, limit)
        bar = figure.colorbar(image, ax=panels, shrink=0.85, pad=0.02)
        bar.set_label("mean loss in accuracy")
        bar.outline.set_visible(False)
        figure.supxlabel(
            "scaffold at evaluation (framed: the one the arm was trained with)", fontsize=9
        )
        return svg_of(figure)


def _draw_matrix(panel: Axes, study: Study, axis: str, values: dict, limit: float):
    from matplotlib.patches import Rectangle

    grid = [[values[axis, arm, scaffold] for scaffold in study.scaffolds] for arm in study.arms]
    image = panel.imshow(grid, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto")
    panel.set_title(AXIS_WORDS[axis], fontsize=10)
    panel.set_xticks(range(len(study.scaffolds)), study.scaffolds, rotation=20, ha="right")
    panel.set_yticks(range(len(study.arms)), list(study.arms))
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for y, arm in enumerate(study.arms):
        for x, scaffold in enumerate(study.scaffolds):
            value = grid[y][x]
            color = _readable_on(image.cmap(image.norm(value)))
            panel.text(x, y, signed(value), ha="center", va="center", fontsize=8.5, color=color)
            if study.arm(arm).scaffold.name == scaffold:
                frame = Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor=color)
                panel.add_patch(frame)
    return image


def _readable_on(background: tuple[float, float, float, float]) -> str:
    """Black or white, whichever contrasts more; the better of the two is always above 4.5 : 1.

    Relative luminance and contrast as WCAG 2.2 defines them.
    """
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in background[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def loss_curve(losses: Sequence[float]) -> bytes:
    """Training loss over steps, as SVG."""
    from matplotlib.figure import Figure
    from matplotlib.style import context

    with context(["default", STYLE]):
        figure = Figure(figsize=(6, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.plot(range(1, len(losses) + 1), losses, color=_HEADLINE, linewidth=1.2)
        axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
        return svg_of(figure)
