"""What is checked of a rendered report: every number is the ledger's, and no part is missing.

The page is read as a reader gets it, not as it was made: a number that was typed into a template
or changed afterwards stands out.
"""

from __future__ import annotations

import html.parser
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_assets.audit import Audit, audit
from persona_assets.reporting import queries
from persona_assets.reporting.conclusions import confidence
from persona_assets.reporting.ledger import Ledger
from persona_assets.reporting.printed import FIELDS, STYLES, written
from persona_assets.reporting.report import SECTIONS, asked
from persona_assets.reporting.trace import read_ledger
from persona_assets.reporting.words import visible
from persona_assets.study import Study

if TYPE_CHECKING:
    import duckdb

#: Numbers of the definitions themselves: "differs from 0", "(1 + #{…}) / (1 + B)".
STRUCTURAL = (0, 1)
#: What an acronym must be introduced with. Others must stand in the study file or in ``_WORDS``.
ACRONYMS = {
    "LoRA": "low-rank adaptation (LoRA)",
    "CoT": "chain of thought (CoT)",
    "SE": "standard error (SE)",
    "SD": "standard deviation (SD)",
    "TOST": "two one-sided tests (TOST)",
}
_WORDS = {"TL", "DR", "LOW", "MODERATE", "HIGH"}

_NAMED = 20
_NUMBER = re.compile(
    r"(?<![\w.])[+−-]?\d+(?:\N{NO-BREAK SPACE}\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)"
    r"(?P<percent>\N{NO-BREAK SPACE}?%)?"
)
_WITH_DIGIT = re.compile(r"[^\s()\[\],;:“”]*\d[^\s()\[\],;:“”]*")
_INLINE = {"a", "code", "em", "span", "strong"}
_VOID = {"br", "img", "meta"}
#: Where no number is looked for: what is not prose, and samples, which have a check of their own.
_SKIPPED = {"code", "pre", "style", "svg", "title"}


@dataclass
class Page(html.parser.HTMLParser):
    """A report, taken apart.

    Attributes:
        numbers: Attributes and text of each element with ``data-number``.
        prose: Visible text without those, without code and without samples.
        sections: Ids of the sections, in order.
        headings: How many ``h2`` each section has.
        figures: Of each figure, its images' alternative texts and its caption.
        samples: Attributes and text of each ``pre``.
        markers: The text of each element with ``data-confidence``, by its value.
    """

    source: str
    numbers: list[tuple[dict[str, str], str]] = field(default_factory=list)
    prose: str = ""
    sections: list[str] = field(default_factory=list)
    headings: dict[str, int] = field(default_factory=dict)
    figures: list[tuple[list[str], str]] = field(default_factory=list)
    samples: list[tuple[dict[str, str], str]] = field(default_factory=list)
    markers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if tag not in _INLINE:
            self.prose += "\n"
        if tag == "section":
            self.sections.append(attributes.get("id", ""))
        if tag == "h2" and self.sections:
            self.headings[self.sections[-1]] = self.headings.get(self.sections[-1], 0) + 1
        if tag == "figure":
            self.figures.append(([], ""))
        if tag == "img" and self._within("figure"):
            self.figures[-1][0].append(attributes.get("alt", ""))
        if tag == "pre":
            self.samples.append((attributes, ""))
        if "data-number" in attributes:
            self.numbers.append((attributes, ""))
        if tag not in _VOID:
            self._open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self.prose += "\n"
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._within("figcaption"):
            images, caption = self.figures[-1]
            self.figures[-1] = (images, caption + data)
        if self._within("pre"):
            attributes, text = self.samples[-1]
            self.samples[-1] = (attributes, text + data)
        for _, attributes in self._open:
            if name := attributes.get("data-confidence"):
                self.markers[name] = self.markers.get(name, "") + data
        if any("data-number" in attributes for _, attributes in self._open):
            attributes, text = self.numbers[-1]
            self.numbers[-1] = (attributes, text + data)
        elif not self._skipped():
            self.prose += data
        else:
            self.prose += " "

    def _within(self, tag: str) -> bool:
        return any(opened == tag for opened, _ in self._open)

    def _skipped(self) -> bool:
        return any(
            tag in _SKIPPED or "sample" in attributes.get("class", "").split()
            for tag, attributes in self._open
        )


def lint_audits(source: str, warehouse: Path, study: Study) -> list[Audit]:
    """The audits ``numbers_in_ledger`` and ``report_structure`` of a rendered page.

    Args:
        source: The page's HTML.
        warehouse: ``warehouse.duckdb``, which the page was rendered from.
        study: The study.

    Raises:
        duckdb.Error: the warehouse cannot be read.
    """
    page = Page(source)
    with queries.open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        numbers = lint_numbers(page, ledger, study)
        structure = lint_structure(page, db, ledger, study)
    return [
        audit(
            "numbers_in_ledger",
            not numbers,
            observed=f"{len(numbers)} numbers that are accounted for nowhere or otherwise; "
            f"{len(page.numbers)} that name their row",
            threshold="0 numbers",
            remedy="Print numbers by their id, and write no digit into a template.",
            violations=numbers[:_NAMED],
        ),
        audit(
            "report_structure",
            not structure,
            observed=f"{len(structure)} faults",
            threshold="0 faults",
            remedy="Mend the templates; if samples differ, materialize the report again.",
            violations=structure[:_NAMED],
        ),
    ]


def lint_numbers(page: Page, ledger: Ledger, study: Study) -> list[str]:
    """One sentence for each number that is neither the ledger's nor the study file's."""
    return [*_not_the_ledgers(page, ledger, study), *_unaccounted(page, study)]


def _not_the_ledgers(page: Page, ledger: Ledger, study: Study) -> Iterator[str]:
    if not page.numbers:
        yield "the page prints no number of the ledger"
    for attributes, text in page.numbers:
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


def _unaccounted(page: Page, study: Study) -> Iterator[str]:
    allowed, file = study_values(study), study.model_dump_json()
    for line in filter(None, map(str.strip, page.prose.split("\n"))):
        for found in _NUMBER.finditer(line):
            if not any(_same(found, value) for value in allowed):
                yield f"{found[0]} is in neither ledger nor study file: {_shown(line, found)}"
        for token in _WITH_DIGIT.findall(_NUMBER.sub(" ", line)):
            name = token.lstrip("−-+±").rstrip(".")
            # A name that holds a digit, or the beginning of one, such as a revision's.
            if not re.search(rf"(?<!\w){re.escape(name)}", file):
                yield f"{token} is in neither ledger nor study file: {line[:100]}"


def _same(found: re.Match[str], value: float) -> bool:
    """Whether printed text is a value, written with as many digits as it has there."""
    text = found[0].removesuffix(found["percent"] or "").replace("\N{NO-BREAK SPACE}", "")
    printed = abs(float(text.replace("−", "-")))
    value = abs(100 * value if found["percent"] else value)
    return printed == value or f"{printed:.4g}" == f"{value:.4g}" or _short(text) == f"{value:.2g}"


def _short(text: str) -> str:
    """The text of a value that is printed with two digits, such as 1 / (1 + B)."""
    return text if "." in text and len(text.strip("+-−0.")) <= 2 else ""


def _shown(line: str, found: re.Match[str]) -> str:
    return line[max(0, found.start() - 40) : found.end() + 40].strip()


def study_values(study: Study) -> set[float]:
    """The numbers that a report may print without the ledger.

    Every number of the study file, counts derived from its grid, levels derived from its tests,
    and :data:`STRUCTURAL`.
    """
    contrasts = study.contrast_list
    arms = dict.fromkeys(cell.arm for cell in study.cells)
    derived = {
        *(len(study.cells), len(study.cells_of("trained")), len(study.cells_of("carry_over"))),
        *(sum(cell.arm == arm for cell in study.cells) for arm in arms),
        *(len(study.personas), len(study.personas) - 1, len(study.scaffolds)),
        *(len(study.sources), len(study.seeds), len(contrasts), len(arms)),
        *(1 - 2 * test.alpha for contrast in contrasts for test in contrast.equivalence),
        1 / (1 + study.inference.resamples),
    }
    recipes = [study.recipe(cell).model_dump(mode="json") for cell in study.cells]
    stated = _numbers_in([study.model_dump(mode="json"), *recipes])
    return {*STRUCTURAL, *derived, *stated}


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers_in(item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def lint_structure(
    page: Page, db: duckdb.DuckDBPyConnection, ledger: Ledger, study: Study
) -> list[str]:
    """One sentence for each part that is missing, out of order, unexplained, or not a real row."""
    return [
        *_sections(page),
        *_figures(page),
        *_acronyms(page, study),
        *_samples(page, db),
        *_markers(page, confidence(study, ledger).marker),
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
    for acronym, introduced in ACRONYMS.items():
        used = re.search(rf"(?<!\w){acronym}(?!\w)", page.prose)
        if used is None:
            continue
        at = page.prose.find(introduced)
        if at < 0 or used.start() < at:
            yield f"{acronym} is used before it is introduced as “{introduced}”"
    file = study.model_dump_json()
    for other in sorted(set(re.findall(r"\b[A-Z]{2,}\b", page.prose))):
        if other not in {*ACRONYMS, *_WORDS} and other not in file:
            yield f"{other} is nowhere introduced"


def _samples(page: Page, db: duckdb.DuckDBPyConnection) -> Iterator[str]:
    tables = {attributes.get("data-table") for attributes, _ in page.samples}
    for table in ("training_rows", "outcomes"):
        if table not in tables:
            yield f"there is no sample row of {table}"
    for attributes, text in page.samples:
        found = [visible(row) for row in _rows(db, attributes)]
        if found != [text]:
            key = ", ".join(f"{name[5:]} {value}" for name, value in attributes.items())
            yield f"the sample of {key or 'no row'} is not what the warehouse holds"


def _rows(db: duckdb.DuckDBPyConnection, key: Mapping[str, str]) -> list[str]:
    """The text of a sample's row, as the warehouse has it."""
    columns = {"cell": "cell", "question": "question_id"}
    match (key.get("data-table"), key.get("data-column")):
        case "training_rows", ("user" | "assistant") as column:
            table = "training_rows"
        case "outcomes", "rationale" as column:
            table = "outcomes"
            columns |= {"persona": "persona", "scaffold": "scaffold"}
        case "questions", "asked":
            sql = "SELECT * FROM questions WHERE question_id = $question"
            return [asked(row) for row in queries.rows(db, sql, question=key["data-question"])]
        case _:
            return []
    where = " AND ".join(f"{name} = ${short}" for short, name in columns.items())
    values = {short: key.get(f"data-{short}", "") for short in columns}
    rows = queries.rows(db, f"SELECT {column} AS text FROM {table} WHERE {where}", **values)
    return [row["text"] or "(no rationale)" for row in rows]


def _markers(page: Page, marker: str) -> Iterator[str]:
    for place in ("title", "section"):
        if page.markers.get(place) != marker:
            yield f"the {place} says {page.markers.get(place)!r}, and the rules give {marker!r}"
