"""Group ``report``: the warehouse, the figures, and the report rendered from them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import inline_plot, schema_metadata, table_preview
from persona_assets.audit import audit
from persona_assets.evaluation.outcomes import BASELINE
from persona_assets.reporting.markdown import data_uri
from persona_assets.reporting.warehouse import CELLS_SCHEMA, CHECKS_SCHEMA
from persona_assets.store import Manifest, Ref


def number_ledger(task: Task) -> Made:
    """Every number that the report prints, each recomputed by its SQL on a passing build."""
    import duckdb

    from persona_assets.reporting.numbers import Tables, study_numbers
    from persona_assets.reporting.trace import evaluated

    tables = Tables(
        estimates=pl.concat(
            [
                *(task.frame("contrast_estimate", c.key) for c in task.study.contrast_list),
                task.frame("exploratory_estimates"),
            ]
        ),
        contrasts=_multiplicity(task, "contrasts"),
        losses=task.frame("loss_matrix"),
        checks=_checks(task),
        vocabulary=_vocabulary(task).get("vocabulary"),
    )
    cells, checks = _cells(task), tables.checks
    with tempfile.TemporaryDirectory(dir=task.draft) as folder:
        path = Path(folder) / "passing.duckdb"
        _build(task, path, {"checks": checks}, cells, passing=True)
        with duckdb.connect(str(path)) as db:
            ledger, disagreements = evaluated(db, study_numbers(task.study, tables))
    task.write(ledger.to_frame(), "numbers")
    # The warehouse takes them from here: a cell that is made again, and comes out the same, has
    # another run and other seconds, which numbers of the ledger tell of.
    task.write(cells, "cells")
    task.write(checks, "checks")
    return Made(
        audits=[
            audit(
                "statistics_agree",
                not disagreements,
                observed=f"{len(disagreements)} of {len(ledger)} numbers differ",
                threshold="0 numbers, to the last bit",
                remedy="SQL and statistics are two readings of one definition: mend either.",
                numbers=disagreements[:20],
            )
        ],
        summary={"numbers": len(ledger)},
        metadata=table_preview(ledger.to_frame().select("number_id", "value", "ci_low", "ci_high")),
    )


def warehouse(task: Task) -> Made:
    """The study's DuckDB database, built from what has landed."""
    from persona_assets.reporting.warehouse import warehouse_audits

    path = task.draft / "warehouse.duckdb"
    cells, checks, numbers = (_ledger(task, name) for name in ("cells", "checks", "numbers"))
    counts = _build(task, path, {"numbers": numbers, "checks": checks}, cells)
    return Made(
        audits=warehouse_audits(path, task.study),
        summary={f"rows_{table}": rows for table, rows in counts.items()},
        metadata=schema_metadata(task.graph, task.ref, _schemas(path)),
    )


def _schemas(warehouse: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Table → column → type and comment of a database."""
    import duckdb

    schemas: dict[str, dict[str, tuple[str, str]]] = {}
    with duckdb.connect(str(warehouse), read_only=True) as db:
        found = db.execute(
            "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() "
            "WHERE table_name IN (SELECT table_name FROM duckdb_tables()) "
            "ORDER BY table_name, column_index"
        ).fetchall()
    for table, column, *described in found:
        schemas.setdefault(table, {})[column] = tuple(described)
    return schemas


def _build(
    task: Task,
    path: Path,
    more: dict[str, pl.DataFrame],
    cells: pl.DataFrame,
    *,
    passing: bool = False,
) -> dict[str, int]:
    """Build a database of what has landed, and ``more`` tables; row counts."""
    from persona_assets.reporting.warehouse import build_warehouse

    study, store = task.study, task.store
    exploratory = task.frame("exploratory_estimates").drop("by_seed", "equivalence", "hypothesis")
    return build_warehouse(
        path,
        study,
        passing=passing,
        questions=store.path(Ref("question_bank"), "questions.parquet"),
        training=[
            store.path(Ref("training_dataset", c.key), "training_rows.parquet") for c in study.cells
        ],
        outcomes=[
            store.path(Ref("baseline_outcomes"), "outcomes.parquet"),
            *(store.path(Ref("cell_outcomes", c.key), "outcomes.parquet") for c in study.cells),
        ],
        cells=cells,
        contrasts=_multiplicity(task, "contrasts"),
        equivalence=_multiplicity(task, "equivalence"),
        losses=task.frame("loss_matrix"),
        more={
            "exploratory": exploratory,
            **_vocabulary(task),
            **more,
        },
    )


def _ledger(task: Task, table: str) -> pl.DataFrame:
    return pl.read_parquet(task.store.path(Ref("number_ledger"), f"{table}.parquet"))


def _multiplicity(task: Task, table: str) -> pl.DataFrame:
    return pl.read_parquet(task.store.path(Ref("multiplicity"), f"{table}.parquet"))


def _vocabulary(task: Task) -> dict[str, pl.DataFrame]:
    """The tables of vocabulary leakage; none where the study has no such measure."""
    if "vocabulary_leakage" not in task.graph.assets:
        return {}
    return {
        name: pl.read_parquet(task.store.path(Ref("vocabulary_leakage"), f"{name}.parquet"))
        for name in ("lexicon", "vocabulary_scores", "vocabulary")
    }


def _cells(task: Task) -> pl.DataFrame:
    """One row a cell and one of the baseline: what it is, and where each part of it comes from."""
    rows = [_evaluation(task.manifest("baseline_outcomes"), BASELINE)]
    for cell in task.study.cells:
        dataset, checkpoint, outcomes = (
            task.manifest(asset, cell.key)
            for asset in ("training_dataset", "checkpoint", "cell_outcomes")
        )
        rows.append(
            _evaluation(outcomes, cell.key)
            | {
                "source": cell.source,
                "arm": cell.arm,
                "seed": cell.seed,
                "origin": cell.origin,
                "checkpoint_source": checkpoint.summary["source"],
                "checkpoint_sha256": checkpoint.data_version,
                ("" if cell.origin == "trained" else "reference_")
                + "dataset_sha256": dataset.data_version,
                "checkpoint_run_id": checkpoint.provenance.run_id,
                "checkpoint_seconds": checkpoint.summary["seconds"],
                "checkpoint_device": checkpoint.summary.get("device"),
            }
        )
    return pl.DataFrame(rows, schema=CELLS_SCHEMA)


def _evaluation(outcomes: Manifest, key: str) -> dict[str, Any]:
    """What is known of an evaluation, the baseline's too."""
    return dict.fromkeys(CELLS_SCHEMA) | {
        "cell": key,
        "outcomes_sha256": outcomes.data_version,
        "outcomes_run_id": outcomes.provenance.run_id,
        "outcomes_seconds": outcomes.summary["seconds"],
        "outcomes_device": outcomes.summary["engine"]["device"],
        "engine": _listed(outcomes.summary["engine"]),
        "code_version": outcomes.provenance.code_version,
        "study_sha256": outcomes.provenance.study_hash,
        "software": _listed(outcomes.provenance.software),
    }


def _checks(task: Task) -> pl.DataFrame:
    """What was checked of everything that the numbers are made from."""
    refs = task.graph.upstream(Ref("number_ledger"))
    rows = [
        {
            "asset": ref.asset,
            "partition": ref.key or "",
            "check_name": found.name,
            "status": found.status,
            "blocking": found.blocking,
            "observed": found.observed,
            "threshold": found.threshold,
            "remedy": found.remedy,
            "details": json.dumps(found.details, ensure_ascii=False, sort_keys=True),
            "run_id": manifest.provenance.run_id,
        }
        for ref in refs
        for manifest in [task.store.landed(ref)]
        for found in manifest.audits
    ]
    return pl.DataFrame(rows, schema=CHECKS_SCHEMA)


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def forest_plot(task: Task) -> Made:
    """The registered contrasts with both schemes' intervals and per-source estimates."""
    from persona_assets.reporting import figures

    contrasts = _multiplicity(task, "contrasts")
    return _figure(task, "forest_plot", figures.forest_plot(contrasts, task.study))


def loss_heatmap(task: Task) -> Made:
    """The loss matrix as a heatmap."""
    from persona_assets.reporting import figures

    image = figures.loss_heatmap(task.frame("loss_matrix"), task.study)
    return _figure(task, "loss_heatmap", image)


def report(task: Task) -> Made:
    """The HTML and Markdown report, rendered from warehouse, figures and study."""
    from persona_assets.reporting.lint import lint_audits
    from persona_assets.reporting.report import render_report

    study, warehouse = task.study, task.store.path(Ref("warehouse"), "warehouse.duckdb")
    figures = _figures(task, warehouse)
    rendered = render_report(warehouse, study, figures)
    for name, svg in figures.items():  # the Markdown refers to them beside it
        (task.draft / f"{name}.svg").write_bytes(svg)
    (task.draft / "report.html").write_text(rendered.html, encoding="utf-8")
    (task.draft / "report.md").write_text(rendered.markdown, encoding="utf-8")
    return Made(
        audits=lint_audits(rendered, warehouse, study),
        summary={"characters": len(rendered.html)},
        metadata={"report": dg.MetadataValue.md(_with_figures(rendered.markdown, figures))},
    )


def _figures(task: Task, warehouse: Path) -> dict[str, bytes]:
    """The report's figures; that of vocabulary leakage is drawn from the warehouse."""
    from persona_assets.reporting.queries import open_warehouse, table
    from persona_assets.reporting.vocabulary_figure import vocabulary_plot
    from persona_assets.stats.lexicon import undefined_because
    from persona_assets.stats.vocabulary import VOCABULARY_SCHEMA

    figures = {
        name: task.store.path(Ref(name), f"{name}.svg").read_bytes()
        for name in ("forest_plot", "loss_heatmap")
    }
    if not undefined_because(task.study):
        with open_warehouse(warehouse) as db:
            estimates = table(db, "vocabulary", VOCABULARY_SCHEMA)
        figures["vocabulary"] = vocabulary_plot(estimates, task.study)
    return figures


def _with_figures(markdown: str, figures: dict[str, bytes]) -> str:
    """The report's Markdown with its figures inside, since the UI has no files beside it."""
    for name, svg in figures.items():
        markdown = markdown.replace(f"]({name}.svg)", f"]({data_uri(svg)})")
    return markdown


def _figure(task: Task, name: str, svg: bytes) -> Made:
    path: Path = task.draft / f"{name}.svg"
    path.write_bytes(svg)
    return Made(metadata={"figure": inline_plot(svg)})
