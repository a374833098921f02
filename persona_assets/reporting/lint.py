"""What is checked of a rendered report: every number is accounted for, and no part is missing.

The page is read as a reader gets it, not as it was made. A number names its row of the ledger or
its place in the study file, a quotation its row of the warehouse, and each must be what stands
there; what names nothing may hold no digit but those of the study file's own names.
"""

from __future__ import annotations

import html.parser
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_assets.audit import Audit, audit
from persona_assets.reporting import queries
from persona_assets.reporting.conclusions import confidence
from persona_assets.reporting.ledger import Ledger
from persona_assets.reporting.markdown import CODE, END, MARK, plain
from persona_assets.reporting.printed import FIELDS, STYLES, StudyValues, written
from persona_assets.reporting.prose import P_FORMULA
from persona_assets.reporting.report import QUOTED_KEYS, SECTIONS, Report, asked
from persona_assets.reporting.threats import quoted_differences
from persona_assets.reporting.trace import read_ledger
from persona_assets.reporting.warehouse import CELLS_SCHEMA
from persona_assets.reporting.words import visible
from persona_assets.study import Study

if TYPE_CHECKING:
    import duckdb

#: What an acronym must be introduced with. Others must stand in the study file or in ``_WORDS``.
ACRONYMS = {
    "LoRA": "low-rank adaptation (LoRA)",
    "CoT": "chain of thought (CoT)",
    "SE": "standard error (SE)",
    "SD": "standard deviation (SD)",
    "TOST": "two one-sided tests (TOST)",
    "GPU": "graphics processor (GPU)",
}
_WORDS = {"TL", "DR", "LOW", "MODERATE", "HIGH"}

_NAMED = 20
#: What stands between spaces and brackets, with a digit in it.
_WITH_DIGIT = re.compile(r"[^\s()\[\],;:|“”]*\d[^\s()\[\],;:|“”]*")
#: A shortened name, such as a revision's first characters, is known by at least so many.
_LEAST_PREFIX = 7
_INLINE = {"a", "code", "em", "span", "strong"}
_VOID = {"br", "img", "meta"}
#: Attributes that a reader sees or hears.
_SPOKEN = ("alt", "aria-label", "title", "placeholder", "value")
#: What an element is looked at by: the attribute that it names its origin with.
_ORIGINS = ("data-number", "data-study", "data-table")


@dataclass
class Page(html.parser.HTMLParser):
    """A report, taken apart.

    Attributes:
        marked: Attributes and text of each element that names its origin.
        codes: The text of each other ``code``.
        prose: Visible text without all those.
        sections: Ids of the sections, in order.
        headings: How many ``h2`` each section has.
        figures: Of each figure, its images' alternative texts and its caption.
        samples: Attributes of each ``pre``.
        markers: The text of each element with ``data-confidence``, by its value.
    """

    source: str
    marked: list[tuple[dict[str, str], str]] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    prose: str = field(init=False)
    sections: list[str] = field(default_factory=list)
    headings: dict[str, int] = field(default_factory=dict)
    figures: list[tuple[list[str], str]] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    markers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, str, bool]] = []  # tag, data-confidence, names its origin
        self._said: list[str] = []
        self.feed(self.source)
        self.close()
        self.prose = "".join(self._said)

    def of(self, origin: str) -> list[tuple[dict[str, str], str]]:
        """What is marked with one of ``_ORIGINS``."""
        return [(attributes, text) for attributes, text in self.marked if origin in attributes]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag not in _INLINE:
            self._said.append("\n")
        for name in _SPOKEN:
            if name in attributes:
                self._said.append(f"\n{attributes[name]}\n")
        if tag == "section":
            self.sections.append(attributes.get("id", ""))
        if tag == "h2" and self.sections:
            self.headings[self.sections[-1]] = self.headings.get(self.sections[-1], 0) + 1
        if tag == "figure":
            self.figures.append(([], ""))
        if tag == "img" and self._within("figure"):
            self.figures[-1][0].append(attributes.get("alt", ""))
        if tag == "pre":
            self.samples.append(attributes)
        origin = any(name in attributes for name in _ORIGINS)
        if origin:
            self.marked.append((attributes, ""))
        elif tag == "code":
            self.codes.append("")
        if tag not in _VOID:
            self._open.append((tag, attributes.get("data-confidence", ""), origin))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self._said.append("\n")
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = {tag for tag, _, _ in self._open}
        if "figcaption" in tags:
            images, caption = self.figures[-1]
            self.figures[-1] = (images, caption + data)
        for name in {name for _, name, _ in self._open if name}:
            self.markers[name] = self.markers.get(name, "") + data
        if any(origin for _, _, origin in self._open):
            attributes, text = self.marked[-1]
            self.marked[-1] = (attributes, text + data)
        elif "code" in tags:
            self.codes[-1] += data
        elif "style" in tags:
            self._said.append(" ".join(re.findall(r"content\s*:\s*([^;}]*)", data)))
        else:
            self._said.append(data)
            return
        self._said.append(" ")

    def _within(self, tag: str) -> bool:
        return any(opened == tag for opened, _, _ in self._open)


def lint_audits(report: Report, warehouse: Path, study: Study) -> list[Audit]:
    """The audits ``numbers_in_ledger`` and ``report_structure`` of a rendered report.

    Args:
        report: The page and its Markdown.
        warehouse: ``warehouse.duckdb``, which they were rendered from.
        study: The study.

    Raises:
        duckdb.Error: the warehouse cannot be read.
    """
    page = Page(report.html)
    with queries.open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        numbers = [
            *lint_numbers(page, db, ledger, study),
            *lint_markdown(report.marked_markdown, page, db, ledger, study),
        ]
        structure = lint_structure(page, ledger, queries.checks(db), study)
    return [
        audit(
            "numbers_in_ledger",
            not numbers,
            observed=f"{len(numbers)} numbers that are accounted for nowhere or otherwise; "
            f"{len(page.marked)} that name where they are from",
            threshold="0 numbers",
            remedy="Print numbers by their id or path, and write no digit into a template; if "
            "quotations differ, materialize the report again.",
            violations=numbers[:_NAMED],
        ),
        audit(
            "report_structure",
            not structure,
            observed=f"{len(structure)} faults",
            threshold="0 faults",
            remedy="Mend the templates.",
            violations=structure[:_NAMED],
        ),
    ]


def lint_numbers(
    page: Page, db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study
) -> list[str]:
    """One sentence for each number or quotation that is not what it is said to be."""
    return [
        *_not_the_ledgers(page, ledger, study),
        *_not_the_studys(page, study),
        *_not_the_warehouses(page, db),
        *_unknown_codes(page, db, ledger, study),
        *_unaccounted(page.prose, _names(study)),
    ]


def _not_the_ledgers(page: Page, ledger: Ledger, study: Study) -> Iterator[str]:
    if not page.of("data-number"):
        yield "the page prints no number of the ledger"
    for attributes, text in page.of("data-number"):
        number_id = attributes["data-number"]
        name, style = attributes.get("data-field", ""), attributes.get("data-style", "")
        if number_id not in ledger:
            yield f"{number_id}: {text} is printed, and the ledger has no such number"
        elif name not in FIELDS or style not in {*STYLES, "p"}:
            yield f"{number_id}: there is no field {name!r} in style {style!r}"
        else:
            try:
                expected = written(ledger[number_id], name, style, study.inference.family_alpha)
            except (TypeError, ValueError) as error:
                expected = f"not to be written so ({error})"
            if visible(expected) != text:
                yield f"{number_id}: {name} is {expected}, and {text} is printed"


def _not_the_studys(page: Page, study: Study) -> Iterator[str]:
    values = StudyValues(study)
    for attributes, text in page.of("data-study"):
        path, style = attributes["data-study"], attributes.get("data-style", "")
        if path not in values or style not in STYLES:
            yield f"the study file states no {path!r} (style {style!r}), and {text} is printed"
        elif (expected := values.say(path, style).text) != text:
            yield f"{path} of the study file is {expected}, and {text} is printed"


def _not_the_warehouses(page: Page, db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    look_up = cache(partial(_look_up, db))  # of a row, a page quotes several columns
    for attributes, text in page.of("data-table"):
        key = {name[5:].replace("-", "_"): value for name, value in attributes.items()}
        found = [visible(value) for value in _quoted(dict(key), look_up)]
        if found != [text]:
            named = ", ".join(f"{name} {value}" for name, value in key.items())
            yield f"what is quoted of {named} is not what the warehouse holds"


def _quoted(key: dict[str, str], look_up: Callable[..., list[queries.Row]]) -> list[str]:
    """The text of what a quotation names, as the warehouse has it; empty if it names nothing."""
    table, column = key.pop("table"), key.pop("column", "")
    if (table, column) == ("questions", "asked") and key.keys() == {"question_id"}:
        return [asked(row) for row in look_up(table, "*", **key)]
    kind = key.pop("confound", None)
    if column not in _QUOTABLE.get(table, {}) or key.keys() != set(QUOTED_KEYS[table]):
        return []
    found = [row[column] for row in look_up(table, ", ".join(_QUOTABLE[table]), **key)]
    if kind is not None:
        return [quoted_differences(value, kind) for value in found]
    instead = _QUOTABLE[table][column]
    return [str(instead if value in (None, "") else value) for value in found]


def _look_up(
    db: duckdb.DuckDBPyConnection, table: str, columns: str, **key: str
) -> list[queries.Row]:
    where = " AND ".join(f"{name} = ${name}" for name in key)
    return queries.rows(db, f"SELECT {columns} FROM {table} WHERE {where}", **key)


#: The columns that a page may quote, and what stands where they are empty.
_QUOTABLE: dict[str, dict[str, str]] = {
    "training_rows": dict.fromkeys(("system", "user", "assistant", "loss_tokens"), "–"),
    "outcomes": {"rationale": "(no rationale)", "rationale_tokens": "–"},
    "checks": dict.fromkeys(("observed", "threshold", "details"), "–"),
    "cells": dict.fromkeys(CELLS_SCHEMA, "–"),
}


def _unknown_codes(
    page: Page, db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study
) -> Iterator[str]:
    """What is set as code, with digits in it, and is no name of the study or the warehouse."""
    known = _known_codes(db, ledger, study)
    for text in page.codes:
        if re.search(r"\d", text) and text not in known:
            yield f"{text} is set as code, and is no name of the study or the warehouse"


def _known_codes(db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study) -> set[str]:
    """The names that may be set as code: of numbers, cells, columns, lexicon words, hashes."""
    known = {P_FORMULA, *ledger, *_strings(study.content)}
    known |= set(queries.study_row(db).values())
    known |= {cell.key for cell in study.cells} | set(study.conditions)
    known |= {contrast.key for contrast in study.contrast_list}
    columns = queries.rows(db, "SELECT table_name, column_name FROM duckdb_columns()")
    known |= {row["column_name"] for row in columns}
    if any(row["table_name"] == "lexicon" for row in columns):
        known |= {row["word"] for row in queries.rows(db, "SELECT word FROM lexicon")}
    return known


def lint_markdown(
    marked: str, page: Page, db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study
) -> list[str]:
    """One sentence for each number of the Markdown that names no origin, or that the page lacks.

    Args:
        marked: The Markdown with its marks (``markdown.MARK``).
        page: The page of the same report, whose numbers were looked up.
    """
    printed = {token for _, text in page.marked for token in _tokens(text)}
    known = _known_codes(db, ledger, study)
    prose, found = "", []
    for kind, text in _pieces(marked):
        if kind == CODE:
            name = text.strip("`").strip().replace("\\|", "|")
            if re.search(r"\d", name) and name not in known:
                found.append(f"{name} is set as code, and is no name of the study or the warehouse")
        elif kind == MARK:
            if not text.startswith("```"):
                found += [
                    f"{token} is in the Markdown, and not on the page"
                    for token in _tokens(plain(text))
                    if token not in printed
                ]
        else:
            prose += plain(text).replace("**", "")
        prose += " " if kind else ""
    return [*found, *_unaccounted(prose, _names(study))]


def _pieces(marked: str) -> Iterator[tuple[str, str]]:
    """The text in order: what stands between marks with the mark, the rest with none."""
    for piece in re.split(f"([{MARK}{CODE}][^{END}]*{END})", marked):
        if piece[:1] in (MARK, CODE):
            yield piece[0], piece[1:-1]
        elif piece:
            yield "", piece


def _unaccounted(prose: str, names: set[str]) -> Iterator[str]:
    """What has a digit and is no name, nor the beginning of a long one."""
    for line in filter(None, map(str.strip, prose.split("\n"))):
        for token in _tokens(line):
            shortened = len(token) >= _LEAST_PREFIX and any(n.startswith(token) for n in names)
            if token not in names and not shortened:
                yield f"{token} is accounted for nowhere: {_around(line, token)}"


def _tokens(text: str) -> list[str]:
    """What has a digit, of any script, a fraction or a numeral in it."""
    text = "".join("0" if c.isnumeric() and not c.isdecimal() else c for c in text)
    return [token.lstrip("*’'\"±").rstrip(".*’'\"…") for token in _WITH_DIGIT.findall(text)]


def _around(line: str, token: str) -> str:
    at = line.find(token)
    return line[max(0, at - 40) : at + len(token) + 40].strip()


def _names(study: Study) -> set[str]:
    """What the study file's own words have digits in: models, revisions, hypotheses."""
    texts = _strings(study.content)
    return {token for text in texts for token in _tokens(text)}


def _strings(value: Any) -> Iterator[str]:
    """Every text of a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _strings(list(item) if isinstance(item, tuple) else item)


def lint_structure(
    page: Page, ledger: Ledger, checks: list[queries.Row], study: Study
) -> list[str]:
    """One sentence for each part that is missing, out of order or unexplained."""
    return [
        *_sections(page),
        *_figures(page),
        *_acronyms(page, study),
        *_samples(page),
        *_markers(page, confidence(study, ledger, checks).marker),
    ]


def _sections(page: Page) -> Iterator[str]:
    if page.sections != list(SECTIONS):
        yield f"sections are {', '.join(page.sections)}; asked: {', '.join(SECTIONS)}"
    for name in page.sections:
        if page.headings.get(name) != 1:
            yield f"section {name} has {page.headings.get(name, 0)} headings, not one"


def _figures(page: Page) -> Iterator[str]:
    if not page.figures:
        yield "the page has no figure"
    for i, (images, caption) in enumerate(page.figures):
        if not images or not all(text.strip() for text in images):
            yield f"figure {i + 1} has an image without alternative text, or none"
        if not caption.strip():
            yield f"figure {i + 1} has no caption"


def _acronyms(page: Page, study: Study) -> Iterator[str]:
    prose = page.prose
    for own in sorted(set(_strings(study.content)), key=len, reverse=True):
        if re.search("[A-Z]{2}|CoT|LoRA", own):  # the study file's own words are its author's
            prose = prose.replace(own, " ")
    for acronym, introduced in ACRONYMS.items():
        used = re.search(rf"(?<!\w){acronym}(?!\w)", prose)
        if used is None:
            continue
        at = prose.find(introduced)
        if at < 0 or used.start() < at:
            yield f"{acronym} is used before it is introduced as “{introduced}”"
    file = json.dumps(study.content, ensure_ascii=False)
    for other in sorted(set(re.findall(r"\b[A-Z]{2,}\b", prose))):
        if other not in {*ACRONYMS, *_WORDS} and other not in file:
            yield f"{other} is nowhere introduced"


def _samples(page: Page) -> Iterator[str]:
    for table in ("training_rows", "outcomes"):
        if not any(sample.get("data-table") == table for sample in page.samples):
            yield f"there is no sample row of {table}"
    for sample in page.samples:
        if "data-table" not in sample:
            yield "a sample names no row of the warehouse"


def _markers(page: Page, marker: str) -> Iterator[str]:
    for place in ("title", "section"):
        if page.markers.get(place) != marker:
            yield f"the {place} says {page.markers.get(place)!r}, and the rules give {marker!r}"
