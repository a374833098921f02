"""Does to the tool what an operator fears, and writes what became of it.

    python -m persona_assets_tests.reliability --results FOLDER --seed 7 [--only kills]

Each section's rows are kept in ``FOLDER`` as JSON, so that one can be run by itself; then the table
of ``docs/reliability.md`` is written from all of them. Exit status 1 if anything was lost.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.reliability.table import Row, markdown

#: Modules of this package, each with ``rows(folder, seed)``, which works in an empty folder.
SECTIONS = ("fuzz", "kills", "concurrency", "disk", "corruption", "determinism", "longrun")
PAGE = PROJECT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


@click.command()
@click.option("--results", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--seed", default=7, show_default=True)
@click.option("--only", type=click.Choice(SECTIONS), multiple=True)
def main(results: Path, seed: int, only: tuple[str, ...]) -> None:
    """Run the sections, and write the table from all that are in RESULTS."""
    results.mkdir(parents=True, exist_ok=True)
    for name in only or SECTIONS:
        section: Callable[[Path, int], list[Row]]
        section = import_module(f"persona_assets_tests.reliability.{name}").rows
        began = time.monotonic()
        with TemporaryDirectory(prefix=f"reliability-{name}-") as folder:
            rows = section(Path(folder), seed)
        seconds = round(time.monotonic() - began)
        (results / f"{name}.json").write_text(
            json.dumps({"seconds": seconds, "seed": seed, "rows": [asdict(r) for r in rows]})
        )
        click.echo(f"{name}: {seconds} s\n{markdown(rows)}")
    found = [results / f"{name}.json" for name in SECTIONS]
    rows = [Row(**r) for p in found if p.exists() for r in json.loads(p.read_text())["rows"]]
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(before + BEGIN + markdown(rows) + END + rest.split(END)[1], "utf-8")
    for row in rows:
        for fault in row.faults:
            click.echo(f"{row.fault}: {fault}", err=True)
    sys.exit(any(row.lost for row in rows))


if __name__ == "__main__":
    main()
