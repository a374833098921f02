"""Plots of single partitions, as Dagster metadata; the report's own figures are its own."""

from __future__ import annotations

from typing import Any

import polars as pl

from persona_assets.assets.metadata import inline_plot
from persona_assets.audit import Distribution


def accuracy_plot(outcomes: pl.DataFrame) -> dict[str, Any]:
    """Share of right answers by scaffold, under the source persona and under the others."""
    who = pl.when("is_source").then(pl.lit("source persona")).otherwise(pl.lit("other personas"))
    if outcomes["is_source"].is_null().all():  # the untrained model has no source
        who = pl.lit("all personas")
    shares = outcomes.group_by("scaffold", who=who, maintain_order=True).agg(
        pl.col("is_correct").mean()
    )
    scaffolds = outcomes["scaffold"].unique(maintain_order=True).to_list()
    by_scaffold = {(name, side): share for name, side, share in shares.rows()}
    series = {
        side: [by_scaffold[name, side] for name in scaffolds]
        for side in ("all personas", "source persona", "other personas")
        if (scaffolds[0], side) in by_scaffold
    }
    return {
        "accuracy": _drawn("accuracy by scaffold", "scaffold", "right answers", series, scaffolds)
    }


def letters_plot(outcomes: pl.DataFrame, baseline: pl.DataFrame) -> dict[str, Any]:
    """How often each letter was predicted, beside the untrained model."""
    letters = sorted({*outcomes["predicted_letter"], *baseline["predicted_letter"]})
    series = {
        name: [frame.filter(predicted_letter=letter).height / frame.height for letter in letters]
        for name, frame in (("this cell", outcomes), ("baseline", baseline))
    }
    return {"letters": _drawn("predicted letters", "letter", "share of answers", series, letters)}


def _drawn(title: str, axis: str, counted: str, series: dict[str, list[float]], bins: list[str]):
    from persona_assets.reporting.distribution import distribution_plot

    return inline_plot(distribution_plot(Distribution(title, axis, counted, bins, series)))


def intervals_plot(estimates: pl.DataFrame) -> dict[str, Any]:
    """One contrast's estimates, scope by scope, with both schemes' intervals.

    Args:
        estimates: ``ESTIMATES_SCHEMA`` of one contrast on one axis.
    """
    from matplotlib.figure import Figure
    from matplotlib.style import context

    from persona_assets.reporting.style import BLUE, INK, LINE, STYLE, VERMILLION, svg_of

    scopes = estimates["scope"].unique(maintain_order=True).to_list()
    with context(["default", STYLE]):
        height = 0.34 * len(scopes) + 0.75
        figure = Figure(figsize=(6, height))
        axes = figure.add_axes((0.24, 0.5 / height, 0.74, 1 - 0.75 / height))
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for scheme, color, shift in (("question", BLUE, -0.12), ("pairs", VERMILLION, 0.12)):
            for row in estimates.filter(scheme=scheme).iter_rows(named=True):
                y = scopes.index(row["scope"]) + shift
                axes.hlines(y, row["ci_low"], row["ci_high"], color=color, linewidth=2)
                label = scheme if row["scope"] == scopes[0] else None
                axes.plot(row["estimate"], y, "s", color=color, markersize=4, label=label)
        axes.set_yticks(range(len(scopes)), scopes)
        axes.set_ylim(len(scopes) - 0.5, -0.5)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.grid(axis="x", color=LINE, linewidth=0.5, alpha=0.6)
        axes.set_xlabel(f"{estimates['contrast'][0]}: difference of mean losses")
        figure.legend(loc="upper right", ncols=2, frameon=False, fontsize=8, borderpad=0.1)
        return {"intervals": inline_plot(svg_of(figure))}
