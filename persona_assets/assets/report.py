"""Group ``report``: the warehouse, the figures, and the report rendered from them."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import polars as pl

from persona_assets.assets.base import Made, Task
from persona_assets.assets.metadata import inline_plot
from persona_assets.reporting.markdown import data_uri
from persona_assets.store import Ref


def warehouse(task: Task) -> Made:
    """The study's DuckDB database, built from what has landed."""
    from persona_assets.reporting.warehouse import build_warehouse, warehouse_audits

    study, store, path = task.study, task.store, task.draft / "warehouse.duckdb"
    counts = build_warehouse(
        path,
        study,
        questions=store.path(Ref("question_bank"), "questions.parquet"),
        training=[
            store.path(Ref("training_dataset", c.key), "training_rows.parquet") for c in study.cells
        ],
        outcomes=[
            store.path(Ref("baseline_outcomes"), "outcomes.parquet"),
            *(store.path(Ref("cell_outcomes", c.key), "outcomes.parquet") for c in study.cells),
        ],
        cells=_cells(task),
        contrasts=pl.read_parquet(store.path(Ref("multiplicity"), "contrasts.parquet")),
        equivalence=pl.read_parquet(store.path(Ref("multiplicity"), "equivalence.parquet")),
        losses=task.frame("loss_matrix"),
    )
    return Made(
        audits=warehouse_audits(path, study),
        summary={f"rows_{table}": rows for table, rows in counts.items()},
    )


def _cells(task: Task) -> pl.DataFrame:
    """One row a cell: what it is, and where each part of it comes from."""
    rows = []
    for cell in task.study.cells:
        dataset, checkpoint, outcomes = (
            task.manifest(asset, cell.key)
            for asset in ("training_dataset", "checkpoint", "cell_outcomes")
        )
        rows.append(
            {
                "cell": cell.key,
                "source": cell.source,
                "arm": cell.arm,
                "seed": cell.seed,
                "origin": cell.origin,
                "checkpoint_source": checkpoint.summary["source"],
                "checkpoint_sha256": checkpoint.data_version,
                "dataset_sha256": dataset.data_version,
                "outcomes_sha256": outcomes.data_version,
                "checkpoint_run_id": checkpoint.provenance.run_id,
                "outcomes_run_id": outcomes.provenance.run_id,
                "checkpoint_seconds": checkpoint.summary["seconds"],
                "outcomes_seconds": outcomes.summary["seconds"],
                "engine": _listed(outcomes.summary["engine"]),
                "study_sha256": outcomes.provenance.study_hash,
                "software": _listed(outcomes.provenance.software),
            }
        )
    return pl.DataFrame(rows)


def _listed(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sorted(values.items()))


def forest_plot(task: Task) -> Made:
    """The registered contrasts with both schemes' intervals and per-source estimates."""
    from persona_assets.reporting import figures

    contrasts = pl.read_parquet(task.store.path(Ref("multiplicity"), "contrasts.parquet"))
    return _figure(task, "forest_plot", figures.forest_plot(contrasts, task.study))


def loss_heatmap(task: Task) -> Made:
    """The loss matrix as a heatmap."""
    from persona_assets.reporting import figures

    image = figures.loss_heatmap(task.frame("loss_matrix"), task.study)
    return _figure(task, "loss_heatmap", image)


def report(task: Task) -> Made:
    """The HTML and Markdown report, rendered from warehouse, figures and study."""
    from persona_assets.reporting.report import render_report

    figures = {
        name: task.store.path(Ref(name), f"{name}.svg").read_bytes()
        for name in ("forest_plot", "loss_heatmap")
    }
    rendered = render_report(
        task.store.path(Ref("warehouse"), "warehouse.duckdb"), task.study, figures
    )
    for name, svg in figures.items():  # the Markdown refers to them beside it
        (task.draft / f"{name}.svg").write_bytes(svg)
    (task.draft / "report.html").write_text(rendered.html, encoding="utf-8")
    (task.draft / "report.md").write_text(rendered.markdown, encoding="utf-8")
    return Made(
        summary={"characters": len(rendered.html)},
        metadata={"report": dg.MetadataValue.md(_with_figures(rendered.markdown, figures))},
    )


def _with_figures(markdown: str, figures: dict[str, bytes]) -> str:
    """The report's Markdown with its figures inside, since the UI has no files beside it."""
    for name, svg in figures.items():
        markdown = markdown.replace(f"]({name}.svg)", f"]({data_uri(svg)})")
    return markdown


def _figure(task: Task, name: str, svg: bytes) -> Made:
    path: Path = task.draft / f"{name}.svg"
    path.write_bytes(svg)
    return Made(metadata={"figure": inline_plot(svg)})
