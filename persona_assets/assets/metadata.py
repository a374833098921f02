"""What a person wants to see on a partition's page: schemas, previews, plots."""

from __future__ import annotations

from typing import Any

import dagster as dg
import polars as pl

from persona_assets.reporting.markdown import inline, picture

_MAX_ROWS, _MAX_CELL = 5, 80


def table_preview(frame: pl.DataFrame) -> dict[str, Any]:
    """Row count, column schema and the first rows of a table, as Dagster metadata."""
    schema = dg.TableSchema([dg.TableColumn(n, str(t)) for n, t in frame.schema.items()])
    return {
        "dagster/row_count": frame.height,
        "dagster/column_schema": schema,
        "preview": dg.MetadataValue.md(markdown_table(frame.head(_MAX_ROWS))),
    }


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
