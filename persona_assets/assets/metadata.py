"""What a person wants to see on a partition's page: schemas, lineage, previews, plots, links."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl

from persona_assets import environment
from persona_assets.columns import describe, sources
from persona_assets.graph import Graph
from persona_assets.reporting.markdown import inline, picture
from persona_assets.store import Manifest, Ref

# References to code are beta in the pinned release; we know, and test them.
warnings.filterwarnings("ignore", category=dg.BetaWarning, message=".*CodeReference")

_MAX_ROWS, _MAX_CELL = 5, 80
#: Characters: Markdown of a thousand and more is shown after a click only.
_MAX_LINKS = 900


def table_preview(frame: pl.DataFrame) -> dict[str, Any]:
    """The first rows of a table, as Dagster metadata."""
    return {"preview": dg.MetadataValue.md(markdown_table(frame.head(_MAX_ROWS)))}


def markdown_table(frame: pl.DataFrame) -> str:
    """A table as Markdown; cells are cut, and cannot break out of theirs (model output is not
    to be trusted)."""
    rows = [list(frame.columns), ["---"] * frame.width]
    rows += [[_cell(value) for value in row] for row in frame.iter_rows()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return inline(text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 1] + "…")


def inline_plot(svg: bytes) -> dg.MarkdownMetadataValue:
    """An SVG as Markdown that the UI shows in place."""
    return dg.MetadataValue.md(str(picture(svg)))


def definition_metadata(make: Callable[..., Any]) -> dict[str, Any]:
    """What is known of an asset before anything of it has landed: the function that makes it."""
    code = make.__code__
    reference = dg.LocalFileCodeReference(
        file_path=code.co_filename, line_number=code.co_firstlineno, label=make.__name__
    )
    return {"dagster/code_references": dg.CodeReferencesMetadataValue(code_references=[reference])}


def table_metadata(graph: Graph, ref: Ref, files: Mapping[str, Path]) -> dict[str, Any]:
    """Rows, column schema and column lineage of the Parquet files that a partition landed."""
    tables = {name.removesuffix(".parquet"): path for name, path in files.items()}
    if not tables:
        return {}
    schemas = {
        table: {
            name: (str(kind), describe(table, name))
            for name, kind in pl.read_parquet_schema(path).items()
        }
        for table, path in tables.items()
    }
    metadata = schema_metadata(graph, ref, schemas)
    if len(tables) == 1:
        (path,) = tables.values()
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()
        kept = "dagster/row_count" if ref.key is None else "dagster/partition_row_count"
        metadata[kept] = rows
    return metadata


def schema_metadata(
    graph: Graph, ref: Ref, schemas: Mapping[str, Mapping[str, tuple[str, str | None]]]
) -> dict[str, Any]:
    """Column schema and lineage of tables, given as table → column → type and description.

    Columns are named ``table.column`` where there are several tables.
    """
    prefixed = len(schemas) > 1
    columns = [
        dg.TableColumn(f"{table}.{name}" if prefixed else name, kind, description)
        for table, schema in schemas.items()
        for name, (kind, description) in schema.items()
    ]
    study, above = graph.study.name, graph.upstream_assets(ref.asset)
    lineage = {}
    for column, found in sources(ref.asset, [column.name for column in columns]):
        split = (source.split(".", 1) for source in found)
        deps = [dg.TableColumnDep([study, a], name) for a, name in split if a in above]
        if deps:
            lineage[column] = deps
    metadata: dict[str, Any] = {"dagster/column_schema": dg.TableSchema(columns)}
    if lineage:
        metadata["dagster/column_lineage"] = dg.TableColumnLineage(lineage)
    return metadata


def lineage_links(graph: Graph, manifest: Manifest) -> dict[str, Any]:
    """Links to the partitions that this one was made from, with the versions it was made from.

    They are relative: the page that shows them is the web interface's.
    """
    versions, lines = manifest.provenance.upstream, []
    for ref in graph.upstream(manifest.ref):
        if str(ref) in versions:
            lines.append(f"- [{inline(ref)}]({_page(graph, ref)}) {versions[str(ref)][:8]}")
    lengths = accumulate(map(len, lines))
    shown = lines[: sum(length <= _MAX_LINKS for length in lengths)]
    if more := len(lines) - len(shown):
        shown = [*shown, f"- and {more} more: see Lineage"]
    return {"made_from": dg.MetadataValue.md("\n".join(shown))} if shown else {}


def number_links(graph: Graph, where: str) -> dict[str, Any]:
    """The way from a partition to the report's numbers: pages, and the query that lists them.

    Args:
        where: SQL over the warehouse's table ``numbers``, which lands after this partition.
    """
    study = graph.study.name
    query = f"SELECT number_id, value FROM numbers WHERE {where} ORDER BY ALL"
    ledger, report = (_page(graph, Ref(asset)) for asset in ("number_ledger", "report"))
    return {
        "numbers": dg.MetadataValue.md(
            f"In the [ledger]({ledger}) and the [report]({report}), once they have landed:\n\n"
            f'    persona-assets sql --study {study} "{query}"\n'
        )
    }


def _page(graph: Graph, ref: Ref) -> str:
    return environment.partition_page(graph.study.name, ref.asset, ref.key, base="")
