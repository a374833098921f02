"""The page "so far": what of a study has landed and what is missing. It is never the report.

Read from manifests and landed estimates alone; rendered as one self-contained HTML file, and as
Markdown for the asset's page in Dagster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from persona_assets.asset_table import JOBS
from persona_assets.freshness import Freshness, State
from persona_assets.hashing import as_json, module_hashes, sha256_file
from persona_assets.naming import listed
from persona_assets.reporting import markdown, words
from persona_assets.reporting.policy import guarded
from persona_assets.stats.estimands import MACRO
from persona_assets.stats.estimates import HEADLINE_SCHEME
from persona_assets.store import Ref, StoreError
from persona_assets.study import Contrast

#: The page's place in the store. It is in no graph: it is made from whatever there is.
SO_FAR = Ref("so_far")

_BASELINE, _REPORT = Ref("baseline_outcomes"), Ref("report")
_TEMPLATES = ("so_far.html.j2", "so_far.md.j2", "report.css.j2")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """One evaluation: a cell's, or the untrained model's.

    Attributes:
        key: The cell's key, or the baseline's asset.
        states: The state of each stage by asset; a stage that does not concern it is left out.
        accuracy: By scaffold, over all personas and questions; empty unless it is up to date.
        version: Data version of its outcomes; empty unless they are up to date.
    """

    key: str
    states: dict[str, State]
    accuracy: dict[str, float]
    version: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """A registered contrast: its landed estimate over all sources, or what it waits for.

    Attributes:
        values: Estimate and interval (questions drawn); None unless it is up to date.
        missing: The cells, and other assets, that have not landed or are not up to date.
        note: What stands in the way otherwise.
    """

    hypothesis: str
    a: str
    b: str
    axis: str
    values: tuple[float, float, float] | None = None
    missing: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class SoFar:
    """What the page says.

    Attributes:
        study: The study's name; ``title``: its title.
        stages: The assets of a cell, in order.
        cells: One row a cell, in grid order.
        estimates: One a registered contrast.
        trouble: What is stale, failed or damaged in itself, in words.
        report: The version of the report if it is up to date, and with it everything else.
    """

    study: str
    title: str
    confidence: float
    scaffolds: tuple[str, ...]
    stages: tuple[str, ...]
    baseline: Row
    cells: tuple[Row, ...]
    estimates: tuple[Estimate, ...]
    trouble: tuple[str, ...]
    report: str | None

    @property
    def complete(self) -> bool:
        """Whether everything has landed, up to the report."""
        return self.report is not None

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been evaluated yet."""
        return not any(row.version for row in (self.baseline, *self.cells))

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """By asset, how many partitions are landed and up to date, of how many."""
        states = {
            stage: [r.states[stage] for r in self.cells if stage in r.states]
            for stage in self.stages
        }
        flags = {stage: [state == "fresh" for state in found] for stage, found in states.items()}
        flags["contrast_estimate"] = [e.values is not None for e in self.estimates]
        return {asset: (sum(done), len(done)) for asset, done in flags.items()}

    @property
    def inputs(self) -> dict[str, Any]:
        """What the page is made from (see ``Freshness.inputs``): equal if it would say the same."""
        folder = Path(__file__).parent / "templates"
        return {
            "code_version": "1",
            "settings": as_json(asdict(self)),
            "sources": module_hashes(
                "reporting.so_far", "reporting.words", "reporting.markdown", "reporting.policy"
            )
            | {name: sha256_file(folder / name) for name in _TEMPLATES},
            "upstream": {
                row.key: row.version for row in (self.baseline, *self.cells) if row.version
            },
        }


def so_far(freshness: Freshness) -> SoFar:
    """What there is now."""
    graph = freshness.graph
    study = graph.study
    stages = tuple(
        name for name in ("prior_checkpoint", *JOBS["cell"].assets) if name in graph.assets
    )
    report = freshness.manifest(_REPORT) if freshness.state(_REPORT) == "fresh" else None
    return SoFar(
        study=study.name,
        title=study.title,
        confidence=study.inference.confidence,
        scaffolds=study.scaffolds,
        stages=stages,
        baseline=_row(freshness, _BASELINE, {}),
        cells=tuple(
            _row(
                freshness,
                Ref("cell_outcomes", cell.key),
                {
                    stage: freshness.state(Ref(stage, cell.key))
                    for stage in stages
                    if graph.assets[stage].has(cell.key)
                },
            )
            for cell in study.cells
        ),
        estimates=tuple(_estimate(freshness, contrast) for contrast in study.contrast_list),
        trouble=tuple(dict.fromkeys(_trouble(freshness))),
        report=report and report.version,
    )


def _row(freshness: Freshness, outcomes: Ref, states: dict[str, State]) -> Row:
    key, manifest = outcomes.key or outcomes.asset, freshness.manifest(outcomes)
    if manifest is None or freshness.state(outcomes) != "fresh":
        return Row(key, states, {}, "")
    scaffolds = freshness.graph.study.scaffolds
    accuracy = {name: manifest.summary[f"accuracy_{name}"] for name in scaffolds}
    return Row(key, states, accuracy, manifest.data_version)


def _estimate(freshness: Freshness, contrast: Contrast) -> Estimate:
    ref = Ref("contrast_estimate", contrast.key)
    named = (contrast.hypothesis, contrast.a, contrast.b, contrast.axis)
    if freshness.state(ref) == "fresh":
        try:
            rows = freshness.store.frame(ref).filter(scope=MACRO, scheme=HEADLINE_SCHEME)
        except StoreError as error:
            return Estimate(*named, note=str(error))
        return Estimate(*named, values=rows.select("estimate", "ci_low", "ci_high").row(0))
    missing = [up for up in freshness.graph.upstream(ref) if freshness.state(up) != "fresh"]
    if not missing:
        return Estimate(*named, note="its cells have landed; its estimate is being made")
    return Estimate(*named, missing=tuple(dict.fromkeys(up.key or up.asset for up in missing)))


def _trouble(freshness: Freshness) -> Iterator[str]:
    """What is not merely missing, nor stale only for what is above it."""
    store = freshness.store
    for ref in freshness.graph.refs:
        state = freshness.state(ref)
        above = all(freshness.state(up) == "fresh" for up in freshness.graph.upstream(ref))
        damaged = state == "missing" and freshness.ever_landed(ref)
        if state == "failed" or (state == "stale" and above) or damaged:
            yield freshness.why(ref).replace(f"{store.root}/", "")


def render_html(page: SoFar) -> str:
    """The page as one HTML file that makes no request."""

    def shown(value: Any) -> Any:
        return words.visible(value) if type(value) is str else value

    return guarded(_render("so_far.html.j2", page, autoescape=True, finalize=shown))


def render_markdown(page: SoFar) -> str:
    """The page as Markdown."""
    return _render("so_far.md.j2", page, autoescape=False, finalize=markdown.inline)


def _render(template: str, page: SoFar, **options: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("persona_assets.reporting"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {
        "axis": words.AXIS_WORDS.__getitem__,
        "code": markdown.code,
        "listed": listed,
        "percent": words.percent,
        "signed": words.signed,
    }
    marks = {"fresh": "✓", "stale": "stale", "failed": "FAILED", "missing": "○"}
    return environment.get_template(template).render(page=page, marks=marks, most=_SHOWN)
