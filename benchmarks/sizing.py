"""What a larger study takes: GPUs and money for `length_matched`, and what grows with the cells.

    python -m benchmarks.sizing cost [--gpus 1 4 64] [--price 3] [--gigabytes 1.25]
    python -m benchmarks.sizing grow DATA FOLDER [--cells 66 990 10010] [--postgres URL]
    python -m benchmarks.sizing requests DATA FOLDER [--cells 66]

``cost`` computes from figures that were measured elsewhere, each named. ``grow`` lays studies of so
many cells into FOLDER, copied from the finished one in DATA (see grown.py), and times what looks at
all of them, each in a process of its own. ``requests`` counts what `persona-assets status` asks of
an S3-protocol server on loopback. Each figure is a JSON line as soon as it is known; tables follow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
import sqlalchemy
import yaml

from benchmarks import grown
from benchmarks.looks import LOOKS, STUDY
from benchmarks.schedule import INPUTS, Machines, Schedule, schedule
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.run_plan import plan
from persona_assets.store import Store
from persona_assets.study import Study, load_study

PROJECT = Path(__file__).parents[1]


def main() -> None:
    """Print JSON lines, then a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("cost")
    command.add_argument("--gpus", type=int, nargs="+", default=[1, 4, 64])
    command.add_argument("--gpus-a-host", type=int, default=8)
    command.add_argument("--price", type=float, default=3.0, help="of a GPU-hour: an assumption")
    command.add_argument(
        "--gigabytes",
        type=float,
        nargs="+",
        default=[1.25, 0.125],
        help="of a host's line, a second",
    )
    for name in ("grow", "requests"):
        command = commands.add_parser(name)
        command.add_argument("data", type=Path, help="data folder of a finished study")
        command.add_argument("folder", type=Path, help="on the file system of DATA")
        sizes = [66, 990, 10010] if name == "grow" else [66]
        command.add_argument("--cells", type=int, nargs="+", default=sizes)
        if name == "grow":
            command.add_argument("--postgres", help="URL of a server: Dagster's history there")
    arguments = parser.parse_args()
    DO[arguments.command](arguments)


def tell(**figure: Any) -> dict[str, Any]:
    """Print a figure as a JSON line."""
    print(json.dumps(figure), flush=True)
    return figure


def table(rows: Sequence[dict[str, Any]]) -> None:
    """Print figures as a Markdown table, one a row, columns as the first has them."""
    names = list(rows[0])
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "")) for name in names) + " |")


# What it costs


def print_costs(arguments: argparse.Namespace) -> None:
    """Wall time, GPU-hours and cost of `length_matched`, and where the GPUs' time goes."""
    for name, found in INPUTS.items():
        tell(input=name, value=round(found.value, 3), source=found.source)
    rows = []
    for gigabytes in arguments.gigabytes:
        for gpus in arguments.gpus:
            for resident in (True, False):
                on = Machines(gpus, arguments.gpus_a_host, gigabytes, resident)
                found = of_length_matched(on)
                rows.append(tell(**cost(found, arguments.price)))
                last = {part: round(seconds) for part, seconds in found.last.items()}
                tell(GPUs=gpus, gigabytes=gigabytes, stay=resident, last_worker=last)
    table(rows)


def of_length_matched(machines: Machines) -> Schedule:
    """The schedule of the whole study, from an empty store."""
    study = load_study(PROJECT / "data" / "studies" / "length_matched.yaml")
    carried = frozenset(cell.key for cell in study.cells_of("carry_over"))
    return schedule(plan(Graph(study), Store(Path(os.devnull), study.name)), carried, machines)


def cost(found: Schedule, price: float) -> dict[str, Any]:
    """A schedule as a figure; shares are of what is paid for, in percent."""
    on, shares = found.machines, {"downloads": ("download", "upload"), "starts": ("start",)}
    shares |= {name: (name,) for name in ("hash", "train", "evaluate", "idle")}
    named = {f"{name}, %": round(100 * found.share(*parts), 1) for name, parts in shares.items()}
    rest = round(100 - sum(named.values()), 1)
    return {
        "GPUs": on.gpus,
        "GB/s a host": on.gigabytes,
        "processes": "stay" if on.resident else "one a unit",
        "hours": round(found.wall / 3600, 2),
        "GPU-hours paid": round(found.gpu_hours, 1),
        "cost": round(found.gpu_hours * price),
        "until the last evaluation, h": round(found.until_evaluated / 3600, 2),
        **named,
        "other, %": rest,
    }


# What an object store is asked


def print_requests(arguments: argparse.Namespace) -> None:
    """What `persona-assets status` asks of an object store, by size of the study."""
    rows = []
    for cells in arguments.cells:
        folder = arguments.folder / str(cells)
        study = grown.grow(grown.Model(arguments.data, STUDY), folder, cells)
        rows.append(tell(cells=len(study.cells), **requests(folder, study)))
    table(rows)


def requests(folder: Path, study: Study) -> dict[str, Any]:
    """Copy a store to an S3-protocol server on loopback; requests of one look at all states."""
    from aiobotocore.client import AioBaseClient

    from persona_assets_tests.object_storage import forget_servers, object_storage

    asked: Counter[str] = Counter()
    call = AioBaseClient._make_api_call

    async def counted(client: Any, operation: str, given: Any) -> Any:
        asked[operation] += 1
        return await call(client, operation, given)

    with object_storage() as server, patch.object(AioBaseClient, "_make_api_call", counted):
        files = [path for path in (folder / "store").rglob("*") if path.is_file()]
        for path in files:
            server.write(str(path.relative_to(folder / "store")), path.read_bytes())
        forget_servers()
        with patch.dict(os.environ, server.environment | {"PERSONA_ASSETS_DATA": str(folder)}):
            graph = Graph(study)
            freshness = Freshness(graph, open_store(study.name)).read_ahead()
            states = Counter(freshness.state(ref) for ref in graph.refs)
    assert states == {"fresh": len(graph.refs)}, (
        f"the copy in object storage is not whole: {states}"
    )
    return {"objects": len(files), "partitions": len(graph.refs), **asked}


# What grows


def print_growth(arguments: argparse.Namespace) -> None:
    """Lay studies of several sizes, and time what looks at the whole of each."""
    rows = []
    for cells in arguments.cells:
        place = arguments.folder / str(cells), arguments.postgres
        rows.append(tell(**growth(arguments.data, *place, cells)))
        tell(load_average=os.getloadavg())
    sizes = [row["cells"] for row in rows]
    steps = [f"{a} to {b}" for a, b in pairwise(sizes)]
    shown = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        times = [f"× {b / a:.1f}" if a else "" for a, b in pairwise(values)]
        named = (*zip(map(str, sizes), values, strict=True), *zip(steps, times, strict=True))
        shown.append({"": name} | dict(named))
    table(shown)


def growth(data: Path, folder: Path, postgres: str | None, cells: int) -> dict[str, Any]:
    """A study of about ``cells`` cells: what it is on disk, and seconds of looking at it."""
    environment = surroundings(folder)
    database = postgres and sqlalchemy.make_url(postgres).set(database=f"cells_{cells}")
    if not folder.exists():
        with patch.dict(os.environ, environment):
            lay(data, folder, database, cells)
    study = load_study(folder / "studies" / f"{STUDY}.yaml")
    history = in_sqlite(folder / "dagster" / "history") if database is None else in_one(database)
    if database is None:
        history["MB of the runs' own files"] = of_runs(grown.Model(data, STUDY), study)
    found = {"cells": len(study.cells), **of_store(folder / "store"), **history}
    for name, command in COMMANDS.items():
        found |= {f"{name}: {k}": v for k, v in timed(command, environment).items()}
    return found


def surroundings(folder: Path) -> dict[str, str]:
    """What a process needs in its environment to look at a study that was laid into ``folder``."""
    return {
        "PERSONA_ASSETS_DATA": str(folder),
        "PERSONA_ASSETS_DAGSTER": str(folder / "dagster"),
        "DAGSTER_HOME": str(folder / "home"),
    }


def lay(data: Path, folder: Path, database: sqlalchemy.URL | None, cells: int) -> None:
    """Store and history of about ``cells`` cells, where the environment has them."""
    model = grown.Model(data, STUDY)
    study = grown.grow(model, folder, cells)
    for name in ("dagster", "home"):
        (folder / name).mkdir()
    config = yaml.safe_load((PROJECT / "dagster.yaml").read_text("utf-8"))
    if database is not None:
        with sqlalchemy.create_engine(
            database.set(database="postgres"), isolation_level="AUTOCOMMIT"
        ).connect() as db:
            db.execute(sqlalchemy.text(f"CREATE DATABASE {database.database}"))
        url = database.render_as_string(hide_password=False)
        config["storage"] = {"postgres": {"postgres_url": url}}
    (folder / "home" / "dagster.yaml").write_text(yaml.safe_dump(config), "utf-8")
    with dg.DagsterInstance.get() as instance:
        grown.record(model, study, instance, every_event=database is not None)


def of_store(store: Path) -> dict[str, Any]:
    """Files, and bytes of what is read to know what has landed."""
    files = [path for path in store.rglob("*") if path.is_file()]
    manifests = [path.stat().st_size for path in files if path.name == "manifest.json"]
    return {
        "files of the store": len(files),
        "MB of manifests": round(sum(manifests) / 1e6, 1),
        "MB of the largest manifest": round(max(manifests) / 1e6, 2),
    }


def in_sqlite(history: Path) -> dict[str, Any]:
    """Bytes and rows of the databases of all runs."""
    found = {}
    for name, tables in _DATABASES.items():
        found[f"MB of {name}"] = round((history / name).stat().st_size / 1e6, 1)
        found |= _rows(sqlalchemy.make_url(f"sqlite:///{history / name}"), tables)
    return found


def of_runs(model: grown.Model, study: Study) -> float:
    """Megabytes of the files with all of a run's events, one a run: as large as the model's."""
    files = Counter(run.copy_of for run in grown.runs(model, Graph(study)))
    folder = model.history / "runs"
    sizes = {run: (folder / f"{run}.db").stat().st_size for run in files}
    return round(sum(sizes[run] * count for run, count in files.items()) / 1e6, 1)


def in_one(database: sqlalchemy.URL) -> dict[str, Any]:
    """Bytes and rows of a Postgres database."""
    with sqlalchemy.create_engine(database).connect() as db:
        size = sqlalchemy.text("SELECT pg_database_size(current_database())")
        found = {"MB of the database": round(db.execute(size).scalar_one() / 1e6, 1)}
    return found | _rows(database, [table for tables in _DATABASES.values() for table in tables])


def _rows(database: sqlalchemy.URL, tables: Sequence[str]) -> dict[str, int]:
    with sqlalchemy.create_engine(database).connect() as db:
        return {
            f"rows of {table}": db.execute(
                sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table(table))
            ).scalar_one()
            for table in tables
        }


#: Dagster's databases of all runs, and those of their tables that grow.
_DATABASES = {
    "runs/index.db": ("event_logs", "asset_event_tags", "asset_check_executions"),
    "runs.db": ("runs", "run_tags"),
}


def timed(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """Run a command: seconds on the clock and of the processor, memory at its peak.

    Raises:
        RuntimeError: it failed.
    """
    began, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=os.environ | environment,
            cwd=PROJECT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        # The kernel's account of an ended process counts the memory of the one that started it.
        while not os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *map(int, re.findall(r"VmHWM:\s+(\d+)", status)), 0)
            time.sleep(0.02)
        _, status, used = os.wait4(process.pid, 0)
        output.seek(0)
        said = output.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    found = {
        "seconds": round(time.monotonic() - began, 2),
        "processor": round(used.ru_utime + used.ru_stime, 2),
        "MiB": round(peak / 1024),
    }
    last = said.strip().splitlines()[-1] if said.strip() else ""
    return found | (json.loads(last) if command[0] == "benchmarks.looks" else {})


#: What is timed at each size: what looks at the whole study.
COMMANDS = {
    "status": ("persona_assets", "status", "--study", STUDY),
    "run": ("persona_assets", "run", "--study", STUDY),
    **{what: ("benchmarks.looks", what) for what in LOOKS},
}
DO = {"cost": print_costs, "grow": print_growth, "requests": print_requests}

if __name__ == "__main__":
    main()
