"""The study's report, in HTML and Markdown, from the warehouse, the study file and the figures.

Text written by a model is untrusted: HTML escapes it, Markdown fences it, and both show control
characters instead of sending them to a reader's screen.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup

from persona_assets import environment
from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.naming import listed
from persona_assets.questions.bank import Question, user_message
from persona_assets.reporting import markdown, queries, words
from persona_assets.reporting.conclusions import (
    confidence,
    contrast_id,
    equivalence_id,
    equivalent,
    headline,
    next_steps,
    summary,
)
from persona_assets.reporting.diagnostic_numbers import STATUSES, STOP_REASONS
from persona_assets.reporting.ledger import Ledger, UnknownNumber
from persona_assets.reporting.policy import guarded
from persona_assets.reporting.printed import (
    MARKED,
    Code,
    Page,
    Quoted,
    StudyValues,
    attributes,
)
from persona_assets.reporting.prose import (
    decision_rule,
    differs,
    forest_caption,
    methods,
    reasoning_arms,
    verdict,
)
from persona_assets.reporting.threats import threats
from persona_assets.reporting.trace import read_ledger
from persona_assets.reporting.vocabulary_figure import top_words
from persona_assets.stats.estimands import MACRO, exploratory, registered
from persona_assets.stats.lexicon import LEXICON_SCHEMA, generating_scaffolds, undefined_because
from persona_assets.stats.losses import AXES
from persona_assets.stats.vocabulary import SCHEME
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
    "vocabulary": "Increases of each arm's share of lexicon words under the bystanders, by "
    "scaffold, with intervals. The same numbers stand in the table below it.",
}

#: The sections of the page, in order, and their headings.
SECTIONS = {
    "tldr": "TL;DR",
    "summary": "Summary",
    "design": "Design",
    "findings": "Findings",
    "contrasts": "Contrasts",
    "losses": "Losses by arm and scaffold",
    "vocabulary": "Vocabulary leakage",
    "exploratory": "Exploratory estimates",
    "diagnostics": "Diagnostics",
    "samples": "Sample rows",
    "earlier": "Comparison with the earlier experiment",
    "methods": "Methods",
    "confidence": "Confidence and threats to validity",
    "next": "Next steps",
    "provenance": "Provenance",
    "ledger": "Ledger",
}

#: The exploratory estimates by kind, and what they are.
_EXPLORATORY = {
    "matched": "Matched contrasts: the registered ones, each arm under the scaffold that it was "
    "trained with.",
    "mismatch": "Scaffold mismatch: an arm's loss under a scaffold minus its loss under the one "
    "that it was trained with.",
    "exploratory": "Further pairs of arms, under the registered scaffold.",
}


@dataclass(frozen=True, slots=True)
class Report:
    """The rendered report.

    Attributes:
        html: One self-contained page; it makes no request.
        marked_markdown: The same as Markdown, with marks around what names its origin.
    """

    html: str
    marked_markdown: str

    @property
    def markdown(self) -> str:
        """The Markdown without the marks; figures are ``<name>.svg`` beside it."""
        return markdown.unmarked(self.marked_markdown)


class ReportError(ValueError):
    """A report that would mix two states of a study, or lacks a figure."""


def render_report(warehouse: Path, study: Study, figures: Mapping[str, bytes]) -> Report:
    """Render the report of one study.

    Args:
        warehouse: ``warehouse.duckdb`` of the study; opened read-only.
        study: The study that the warehouse was built for.
        figures: SVG bytes by name, for every name in :func:`figure_names`.

    Raises:
        ReportError: the warehouse is of another study file, lacks a number, or a
            figure is absent.
        duckdb.Error: the warehouse cannot be read.
    """
    if absent := [name for name in figure_names(study) if name not in figures]:
        raise ReportError(f"figures absent: {', '.join(absent)}. Materialize them first.")
    alpha = study.inference.family_alpha
    try:
        with queries.open_warehouse(warehouse) as db:
            ledger = read_ledger(db)
            context = _context(db, ledger, study, warehouse)
        values = StudyValues(study)
        page, text_page = (Page(ledger, alpha) for _ in range(2))
        html = _html_environment(figures, page, values).get_template("report.html.j2")
        text = _markdown_environment(text_page, values).get_template("report.md.j2")
        return Report(html=guarded(html.render(context)), marked_markdown=text.render(context))
    except UnknownNumber as error:
        raise ReportError(
            f"{warehouse}, table numbers: {error} Materialize number_ledger and warehouse."
        ) from error


def figure_names(study: Study) -> list[str]:
    """The figures of a study's report: among :data:`FIGURES`, in order."""
    return [name for name in FIGURES if name != "vocabulary" or not undefined_because(study)]


def _context(
    db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study, warehouse: Path
) -> dict[str, Any]:
    facts = queries.study_row(db)
    if facts["study_sha256"] != study.content_hash:
        raise ReportError(
            f"{warehouse} is of study file {facts['study_sha256'][:12]}, and the study file is now "
            f"{study.content_hash[:12]}. Materialize the warehouse again."
        )
    checks = queries.checks(db)
    return (
        _study_context(study, ledger, checks)
        | _samples(db, study)
        | {
            "facts": facts,
            "code_versions": _code_versions(db),
            "cells": _cells(db, study),
            "lexicon": _lexicon(db, study),
            "checked": _checked(checks),
            "drift": any(row["check_name"] == "drift" for row in checks),
            "threats": threats(study, ledger, checks),
        }
    )


def _study_context(study: Study, ledger: Ledger, checks: list[queries.Row]) -> dict[str, Any]:
    """What follows from study file and ledger."""
    return {
        "study": study,
        "arms": {name: study.arm(name) for name in study.arms},
        "axes": AXES,
        "rule": decision_rule(study),
        "sections": SECTIONS,
        "headline": headline(study, ledger, checks),
        "summary": summary(study, ledger, checks),
        "confidence": confidence(study, ledger, checks),
        "hypotheses": _hypotheses(study, ledger),
        "exploratory": _exploratory(study),
        "baseline": {scaffold: _extremes(study, ledger, scaffold) for scaffold in study.scaffolds},
        "design": _design(study),
        "methods": methods(study),
        "reasoning": reasoning_arms(study),
        "next_steps": next_steps(study, ledger, checks),
        "no_vocabulary": undefined_because(study),
        "generating": generating_scaffolds(study),
        "evaluated_arms": (BASELINE, *study.arms),
        "stop_reasons": STOP_REASONS,
        "statuses": STATUSES,
        "earlier": [_earlier(study, c) for c in study.contrast_list if c.published],
        "vocabulary_scheme": SCHEME,
        "figures": FIGURES,
        "partition_page": partial(partition_page, study),
        "forest_caption": forest_caption(study),
    }


def _hypotheses(study: Study, ledger: Ledger) -> dict[str, list[dict[str, Any]]]:
    """The registered contrasts by hypothesis, each with the ids of its numbers and its verdict."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for contrast in study.contrast_list:
        grouped.setdefault(contrast.hypothesis, []).append(_entry(study, ledger, contrast))
    return grouped


def _entry(study: Study, ledger: Ledger, contrast: Contrast) -> dict[str, Any]:
    macro = ledger[contrast_id(study, contrast)]
    tests = [
        {
            "margin": f"{contrast.path}.equivalence.{i}.margin",
            "id": (number_id := equivalence_id(study, contrast, test)),
            "equivalent": equivalent(ledger[number_id], test.margin),
        }
        for i, test in enumerate(contrast.equivalence)
    ]
    return {
        "contrast": contrast,
        "key": registered(study, contrast).key,
        "sources": study.contrast_sources(contrast),
        "tests": tests,
        "differs": differs(study, macro),
        "verdict": verdict(study, macro),
    }


def _earlier(study: Study, contrast: Contrast) -> dict[str, Any]:
    """A published value's place in the study file, beside the numbers that it is compared with."""
    path = f"{contrast.path}.published.{contrast.axis}"
    return {
        "contrast": contrast,
        "key": f"{registered(study, contrast).key}/{MACRO}",
        "estimate": f"{path}.estimate",
        "interval": [f"{path}.interval.{end}" for end in range(2)]
        if contrast.published.interval
        else [],
    }


def _checked(checks: list[queries.Row]) -> list[dict[str, Any]]:
    """Each check of each asset, and the first partition that did not pass it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in checks:
        name = (row["asset"], row["check_name"])
        entry = found.setdefault(name, {"asset": name[0], "check": name[1], "first": None})
        if row["status"] != "passed" and entry["first"] is None:
            entry["first"] = row
    return list(found.values())


def _exploratory(study: Study) -> list[dict[str, Any]]:
    """The exploratory estimands by kind; a kind without any is left out."""
    found = exploratory(study)
    return [
        {"kind": kind, "caption": caption, "estimands": [e for e in found if e.kind == kind]}
        for kind, caption in _EXPLORATORY.items()
        if any(e.kind == kind for e in found)
    ]


def _extremes(study: Study, ledger: Ledger, scaffold: str) -> dict[str, Any]:
    """The personas of the untrained model's lowest and highest accuracy, and whether all tie."""
    key = f"accuracy/{BASELINE}/{scaffold}"
    accuracy = {persona: ledger[f"{key}/{persona}"].value for persona in study.personas}
    lowest = min(accuracy, key=lambda persona: (accuracy[persona], persona))
    highest = max(accuracy, key=lambda persona: accuracy[persona])
    return {
        "lowest": lowest,
        "highest": highest,
        "tie": accuracy[lowest] == accuracy[highest],
    }


def _design(study: Study) -> list[dict[str, Any]]:
    """One row an arm, in grid order: its origin and its cells."""
    rows = []
    for arm in dict.fromkeys(cell.arm for cell in study.cells):
        cells = [cell for cell in study.cells if cell.arm == arm]
        rows.append(
            {
                "arm": study.arm(arm),
                "origin": cells[0].origin,
                "sources": list(dict.fromkeys(cell.source for cell in cells)),
            }
        )
    return rows


def partition_page(study: Study, cell: str) -> str:
    """The address of an evaluation's page in the web interface."""
    if cell == BASELINE:
        return environment.partition_page(study.name, "baseline_outcomes")
    return environment.partition_page(study.name, "cell_outcomes", cell)


def _cells(db: duckdb.DuckDBPyConnection, study: Study) -> list[dict[str, Any]]:
    """Each evaluation's identity, and the page of its partition."""
    return [
        {
            "key": row["cell"],
            "page": partition_page(study, row["cell"]),
            "identity": {name: _quote(row, "cells", name) for name in row if name != "cell"},
        }
        for row in queries.cells(db)
    ]


def _code_versions(db: duckdb.DuckDBPyConnection) -> list[Quoted]:
    """The versions of the code that evaluated, each quoted where it stands first."""
    first = {row["code_version"]: row for row in queries.cells(db)[::-1]}
    return [_quote(first[version], "cells", "code_version") for version in sorted(first)]


def _lexicon(db: duckdb.DuckDBPyConnection, study: Study) -> list[dict[str, Any]]:
    if undefined_because(study):
        return []
    return top_words(queries.table(db, "lexicon", LEXICON_SCHEMA), study)


def _samples(db: duckdb.DuckDBPyConnection, study: Study) -> dict[str, Any]:
    """One question's rows, arm by arm: as trained on, and as answered."""
    seed, scaffold = study.seeds[0], study.inference.scaffold
    training = queries.sample_training_rows(db, seed)
    source = training[0]["source"]
    outcomes = queries.sample_outcomes(db, persona=source, seed=seed, scaffold=scaffold)
    of_question = {"question_id": outcomes[0]["question_id"]}
    return {
        "training": _by_arm(training, study),
        "outcomes": _by_arm(outcomes, study),
        "asked": Quoted(asked(outcomes[0]), "questions", "asked", of_question),
        "forced": study.scaffold(scaffold).forces is not None,
    }


def asked(outcome: queries.Row) -> str:
    """What the model was asked, from an outcome with its question's text and choices."""
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


#: What tells the rows of a table apart that a page quotes.
QUOTED_KEYS = {
    "training_rows": ("cell", "question_id"),
    "outcomes": ("cell", "persona", "scaffold", "question_id"),
    "checks": ("asset", "partition", "check_name"),
    "cells": ("cell",),
}


def _quote(row: queries.Row, table: str, column: str, instead: str = "–") -> Quoted:
    """A value of a row of the warehouse, to print word for word."""
    return Quoted(row[column], table, column, {k: row[k] for k in QUOTED_KEYS[table]}, instead)


def _environment(
    page: Page, values: StudyValues, finalize: Callable[[Any], Any], **kwargs: Any
) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("persona_assets.reporting"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=finalize,
        **kwargs,
    )
    environment.filters |= {
        "listed": listed,
        "axis": words.AXIS_WORDS.__getitem__,
        "origin": words.ORIGIN_WORDS.__getitem__,
        "upper_first": lambda text: text[:1].upper() + text[1:],
    }
    environment.globals |= {
        "BASELINE": BASELINE,
        "MACRO": MACRO,
        "num": page.number,
        "maybe": page.maybe,
        "page": page,
        "stated": values.say,
        "quote": _quote,
    }
    return environment


def _html_environment(
    figures: Mapping[str, bytes], page: Page, values: StudyValues
) -> jinja2.Environment:
    def shown(value: Any) -> Any:
        if isinstance(value, MARKED):
            return page.marked(value)
        return words.visible(value) if type(value) is str else value

    environment = _environment(page, values, shown, autoescape=True)
    environment.filters["attributes"] = attributes
    # In an image element the SVG's own style sheet and ids cannot reach the page.
    environment.globals["figure"] = lambda name: (
        "data:image/svg+xml;base64," + base64.b64encode(figures[name]).decode("ascii")
    )
    return environment


def _markdown_environment(page: Page, values: StudyValues) -> jinja2.Environment:
    def code(value: Any) -> Markup:
        return Markup(f"{markdown.CODE}{markdown.code(value)}{markdown.END}")

    def shown(value: Any) -> Any:
        if isinstance(value, Code):
            return code(value.text)
        if isinstance(value, MARKED):
            return markdown.marked(markdown.inline(page.text(value)))
        return markdown.inline(value)

    environment = _environment(page, values, shown, autoescape=False)
    environment.filters |= {
        "code": code,
        "fence": lambda text: markdown.marked(markdown.fence(text)),
    }
    return environment
