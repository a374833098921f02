"""The study's report, in HTML and Markdown, from nothing but the warehouse and the study file.

Text written by a model is untrusted: HTML escapes it, Markdown fences it, and both show control
characters instead of sending them to a reader's screen.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.questions.bank import Question, user_message
from persona_assets.reporting import markdown, queries, words
from persona_assets.reporting.prose import (
    decision_rule,
    differs,
    forest_caption,
    methods,
    threats,
    verdict,
)
from persona_assets.stats.contrasts import HEADLINE_SCHEME, MACRO
from persona_assets.stats.losses import AXES
from persona_assets.study import Contrast, Study

if TYPE_CHECKING:
    import duckdb

#: Alternative text of the figures that the templates place, by name.
FIGURES = {
    "forest_plot": "Forest plot: for each registered contrast, the macro estimate with its "
    "interval under both resampling schemes, and the estimates of the single sources. The same "
    "numbers stand in the tables of contrasts and of estimates by source.",
    "loss_heatmap": "Heatmap of mean losses, arm by scaffold, on both axes. The same numbers stand "
    "in the tables of losses.",
}


@dataclass(frozen=True, slots=True)
class Report:
    """The rendered report.

    Attributes:
        html: One self-contained page; it makes no request.
        markdown: The same; figures are ``<name>.svg`` beside it.
    """

    html: str
    markdown: str


class ReportError(ValueError):
    """A report that would mix two states of a study, or lacks a figure."""


def render_report(warehouse: Path, study: Study, figures: Mapping[str, bytes]) -> Report:
    """Render the report of one study.

    Args:
        warehouse: ``warehouse.duckdb`` of the study; opened read-only.
        study: The study that the warehouse was built for.
        figures: SVG bytes by name, for every name in :data:`FIGURES`.

    Raises:
        ReportError: the warehouse is of another study file, lacks a registered contrast, or a
            figure is absent.
        duckdb.Error: the warehouse cannot be read.
    """
    import duckdb

    if absent := [name for name in FIGURES if name not in figures]:
        raise ReportError(f"figures absent: {', '.join(absent)}. Materialize them first.")
    with duckdb.connect(str(warehouse), read_only=True) as db:
        context = _context(db, study, warehouse)
    return Report(
        html=_html_environment(figures).get_template("report.html.j2").render(context),
        markdown=_markdown_environment().get_template("report.md.j2").render(context),
    )


def _context(db: duckdb.DuckDBPyConnection, study: Study, warehouse: Path) -> dict[str, Any]:
    facts = queries.provenance(db)
    if facts["study_sha256"] != study.content_hash:
        raise ReportError(
            f"{warehouse} is of study file {facts['study_sha256'][:12]}, and the study file is now "
            f"{study.content_hash[:12]}. Materialize the warehouse again."
        )
    seed = study.seeds[0]
    training = queries.sample_training_rows(db, seed)
    source = training[0]["source"]
    scaffold = study.inference.scaffold
    outcomes = queries.sample_outcomes(db, persona=source, seed=seed, scaffold=scaffold)
    return {
        "study": study,
        "facts": facts,
        "arms": {name: study.arm(name) for name in study.arms},
        "axes": AXES,
        "rule": decision_rule(study),
        "hypotheses": _hypotheses(db, study),
        "losses": queries.macro_losses(db),
        "baseline": queries.baseline_accuracy(db),
        "design": _design(db, study),
        "methods": methods(study, facts),
        "threats": threats(study),
        "training": _by_arm(training, study),
        "outcomes": _by_arm(outcomes, study),
        "asked": _asked(outcomes[0]),
        "forced": study.scaffold(scaffold).forces is not None,
        "cells": queries.cells(db),
        "figures": FIGURES,
        "forest_caption": forest_caption(study),
    }


def _hypotheses(db: duckdb.DuckDBPyConnection, study: Study) -> dict[str, list[dict[str, Any]]]:
    """The registered contrasts by hypothesis, each with its estimates and verdict in words."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for contrast in study.contrast_list:
        entry = _contrast_entry(db, study, contrast)
        grouped.setdefault(contrast.hypothesis, []).append(entry)
    return grouped


def _contrast_entry(
    db: duckdb.DuckDBPyConnection, study: Study, contrast: Contrast
) -> dict[str, Any]:
    found = queries.estimates(db, contrast)
    try:
        question, pairs = found[MACRO, HEADLINE_SCHEME], found[MACRO, "pairs"]
        by_source = {s: found[s, HEADLINE_SCHEME] for s in study.contrast_sources(contrast)}
    except KeyError as error:
        raise ReportError(
            f"the warehouse has no row {error.args[0]} of the contrast {contrast.key}. "
            "Materialize contrast_estimate, multiplicity and warehouse."
        ) from error
    tests = queries.equivalence_tests(db, contrast, HEADLINE_SCHEME)
    return {
        "contrast": contrast,
        "question": question,
        "pairs": pairs,
        "by_source": by_source,
        "error_ratio": question["std_error"] / pairs["std_error"] if pairs["std_error"] else None,
        "n_questions": question["n_pairs"] // (len(by_source) * len(study.seeds)),
        "seed_spread": queries.seed_spread(db, study, contrast),
        "tests": tests,
        "differs": differs(study, question),
        "verdict": verdict(study, question),
    }


def _design(db: duckdb.DuckDBPyConnection, study: Study) -> list[dict[str, Any]]:
    """One row an arm, in grid order: its origin, sources and counts."""
    outcomes = queries.outcome_counts(db)
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in study.cells):
        cells = [cell for cell in study.cells if cell.arm == arm]
        rows.append(
            {
                "arm": study.arm(arm),
                "origin": cells[0].origin,
                "sources": list(dict.fromkeys(cell.source for cell in cells)),
                "seeds": list(dict.fromkeys(cell.seed for cell in cells)),
                "n_cells": len(cells),
                "n_outcomes": outcomes.get(arm, 0),
            }
        )
    return rows


def _asked(outcome: queries.Row) -> str:
    """What the model was asked in a sample outcome."""
    choices = tuple(outcome["choices"])
    return user_message(
        Question(
            outcome["question_id"], "eval", outcome["text"], choices, outcome["correct_letter"]
        )
    )


def _by_arm(rows: list[queries.Row], study: Study) -> list[queries.Row]:
    """Sample rows in the study's order of arms, the baseline first."""
    order = {arm: i for i, arm in enumerate(study.arms)}
    return sorted(rows, key=lambda row: order.get(row["arm"], -1))


def _environment(**kwargs: Any) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("persona_assets.reporting"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **kwargs,
    )
    environment.filters |= {
        "signed": words.signed,
        "p": words.p_text,
        "percent": words.percent,
        "listed": words.listed,
        "axis": words.AXIS_WORDS.__getitem__,
        "origin": words.ORIGIN_WORDS.__getitem__,
        "count": words.count,
        "value": words.table_value,
    }
    environment.globals["BASELINE"] = BASELINE
    return environment


def _html_environment(figures: Mapping[str, bytes]) -> jinja2.Environment:
    environment = _environment(
        autoescape=True,
        finalize=lambda v: words.visible(v) if isinstance(v, str) and type(v) is not Markup else v,
    )
    # In an image element the SVG's own style sheet and ids cannot reach the page.
    environment.globals["figure"] = lambda name: (
        "data:image/svg+xml;base64," + base64.b64encode(figures[name]).decode("ascii")
    )
    return environment


def _markdown_environment() -> jinja2.Environment:
    environment = _environment(autoescape=False, finalize=markdown.inline)
    environment.filters |= {"code": markdown.code, "fence": markdown.fence}
    return environment
