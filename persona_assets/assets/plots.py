"""Plots of single partitions, as Dagster metadata; the report's own figures are its own.

The UI shows Markdown in place up to 999 characters, and what is longer after a click: what should
be seen at once is drawn in letters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import polars as pl

from persona_assets.assets.metadata import inline_plot
from persona_assets.reporting.markdown import inline

_BAR, _STEPS, _SPARK = 10, "▁▂▃▄▅▆▇█", 40


def accuracy_bars(outcomes: pl.DataFrame) -> dict[str, Any]:
    """Share of right answers by scaffold, under the source persona and under the others."""
    who = pl.when("is_source").then(pl.lit("source persona")).otherwise(pl.lit("other personas"))
    if outcomes["is_source"].is_null().all():  # the untrained model has no source
        who = pl.lit("all personas")
    shares = outcomes.group_by(who=who).agg(pl.col("scaffold"), pl.col("is_correct"))
    columns = {
        side: dict(
            pl.DataFrame({"scaffold": scaffolds, "right": right})
            .group_by("scaffold", maintain_order=True)
            .agg(pl.col("right").mean())
            .rows()
        )
        for side, scaffolds, right in shares.sort("who", descending=True).rows()
    }
    return {"accuracy": _bars("scaffold", columns)}


def letters_bars(outcomes: pl.DataFrame, baseline: pl.DataFrame) -> dict[str, Any]:
    """How often each letter was predicted, beside the untrained model."""
    letters = pl.concat([outcomes["predicted_letter"], baseline["predicted_letter"]]).drop_nulls()
    columns = {
        name: {
            letter: frame.filter(predicted_letter=letter).height / max(frame.height, 1)
            for letter in letters.unique().sort()
        }
        for name, frame in (("this cell", outcomes), ("baseline", baseline))
    }
    return {"predicted_letters": _bars("letter", columns)}


def _bars(what: str, columns: Mapping[str, Mapping[str, float]]) -> dg.MarkdownMetadataValue:
    """Shares between 0 and 1 as a table of bars, one row a name and one column a series.

    Where rows are missing it is for a check to say so, not for this to fail.
    """
    rows = [[what, *columns], ["---"] * (1 + len(columns))]
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        rows.append([inline(name), *(_bar(column.get(name)) for column in columns.values())])
    return dg.MetadataValue.md("\n".join(f"| {' | '.join(row)} |" for row in rows))


def _bar(share: float | None) -> str:
    if share is None:
        return "–"
    full = round(share * _BAR)
    return f"{'█' * full}{'░' * (_BAR - full)} {share:.3f}"


def sparkline(values: Sequence[float]) -> str:
    """First value, at most 40 means of neighbours as blocks of that height, last value.

    What is not finite has the height of a dot.
    """
    if not values:
        return "no value"
    n = min(len(values), _SPARK)
    edges = [round(i * len(values) / n) for i in range(n + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)] or [0.0]
    low, high = min(finite), max(finite)
    scale = (len(_STEPS) - 1) / (high - low) if high > low else 0.0
    blocks = "".join(
        _STEPS[round((mean - low) * scale)] if math.isfinite(mean) else "·" for mean in means
    )
    return f"{values[0]:.3f} {blocks} {values[-1]:.3f}"


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
        height = 0.34 * len(scopes) + 0.95
        figure = Figure(figsize=(6, height))
        axes = figure.add_axes((0.24, 0.5 / height, 0.74, 1 - 0.8 / height))
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for scheme, words, color, shift in (
            ("question", "questions drawn", BLUE, -0.12),
            ("pairs", "pairs drawn", VERMILLION, 0.12),
        ):
            for row in estimates.filter(scheme=scheme).iter_rows(named=True):
                y = scopes.index(row["scope"]) + shift
                axes.hlines(y, row["ci_low"], row["ci_high"], color=color, linewidth=2)
                label = words if row["scope"] == scopes[0] else None
                axes.plot(row["estimate"], y, "s", color=color, markersize=4, label=label)
        axes.set_yticks(range(len(scopes)), scopes)
        axes.set_ylim(len(scopes) - 0.5, -0.5)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.grid(axis="x", color=LINE, linewidth=0.5, alpha=0.6)
        axes.set_xlabel(f"{estimates['contrast'][0]}: difference of mean losses")
        figure.legend(loc="upper right", ncols=2, frameon=False, fontsize=8, borderpad=0.1)
        return {"intervals": inline_plot(svg_of(figure))}
