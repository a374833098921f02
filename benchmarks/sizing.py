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
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster._core.storage.partition_status_cache import get_and_update_asset_status_cache_value
from dagster._serdes import serialize_value

from benchmarks import grown
from benchmarks.schedule import INPUTS, Machines, Schedule, schedule
from persona_assets import definitions
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.partitions import partitions_definition
from persona_assets.runner import plan
from persona_assets.store import Store
from persona_assets.study import Study, load_study

PROJECT = Path(__file__).parents[1]
#: The name of the finished study, and of those grown from it.
STUDY = "tiny"


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
        command.add_argument("folder", type=Path, help="on the file system of DATA; must not exist")
        sizes = [66, 990, 10010] if name == "grow" else [66]
        command.add_argument("--cells", type=int, nargs="+", default=sizes)
        if name == "grow":
            command.add_argument("--postgres", help="URL of an empty database, for the event log")
    command = commands.add_parser("one")
    command.add_argument("what", choices=ONE)
    arguments = parser.parse_args()
    if arguments.command == "cost":
        print_costs(arguments)
    elif arguments.command == "one":
        print(json.dumps(ONE[arguments.what]()))
    else:
        arguments.folder.mkdir(parents=True)
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
        rows.append(tell(**growth(arguments.data, arguments.folder / str(cells), cells)))
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


def growth(data: Path, folder: Path, cells: int) -> dict[str, Any]:
    """A study of about ``cells`` cells: what it is on disk, and seconds of looking at it."""
    environment = {
        "PERSONA_ASSETS_DATA": str(folder),
        "PERSONA_ASSETS_DAGSTER": str(folder / "dagster"),
        "DAGSTER_HOME": str(PROJECT),
    }
    if not folder.exists():
        with patch.dict(os.environ, environment):
            lay(data, folder, cells)
    study = load_study(folder / "studies" / f"{STUDY}.yaml")
    found = {"cells": len(study.cells), **on_disk(folder)}
    for name, command in COMMANDS.items():
        found |= {f"{name}: {k}": v for k, v in timed(command, environment).items()}
    return found


def lay(data: Path, folder: Path, cells: int) -> None:
    """Store and history of about ``cells`` cells, in the folder that the environment names."""
    model = grown.Model(data, STUDY)
    study = grown.grow(model, folder, cells)
    (folder / "dagster").mkdir()
    with dg.DagsterInstance.get() as instance:
        grown.record(model, study, instance, every_event=False)


def on_disk(folder: Path) -> dict[str, Any]:
    """Files and bytes of the store, rows and bytes of Dagster's databases."""
    files = [path.stat().st_size for path in (folder / "store").rglob("*") if path.is_file()]
    manifests = [path.stat().st_size for path in (folder / "store").rglob("manifest.json")]
    history = folder / "dagster" / "history"
    found = {
        "files of the store": len(files),
        "MB of manifests": round(sum(manifests) / 1e6, 1),
        "MB of the largest manifest": round(max(manifests) / 1e6, 2),
    }
    for name, tables in _DATABASES.items():
        found[f"MB of {name}"] = round((history / name).stat().st_size / 1e6, 1)
        with closing(sqlite3.connect(f"{(history / name).as_uri()}?mode=ro", uri=True)) as db:
            for table in tables:
                (found[f"rows of {table}"],) = db.execute(
                    f"SELECT count(*) FROM {table}"
                ).fetchone()
    return found


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
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=os.environ | environment,
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{said[-2000:]}")
    found = {
        "seconds": round(time.monotonic() - began, 2),
        "processor": round(used.ru_utime + used.ru_stime, 2),
        "MiB": round(used.ru_maxrss / 1024),
    }
    last = said.strip().splitlines()[-1] if said.strip() else ""
    return found | (json.loads(last) if command[0] == "benchmarks.sizing" else {})


def clocked(do: Callable[[], Any]) -> tuple[Any, float]:
    """What something returns, and the processor's seconds that it took."""
    began = time.process_time()
    result = do()
    return result, round(time.process_time() - began, 3)


def build_definitions() -> dict[str, Any]:
    """The study's code location, and what it sends to the web interface."""
    study = load_study(Path(os.environ["PERSONA_ASSETS_DATA"], "studies", f"{STUDY}.yaml"))
    built, seconds = clocked(lambda: definitions.study_definitions(study).get_repository_def())
    sent, serialized = clocked(lambda: serialize_value(RepositorySnap.from_def(built)))
    return {"to build": seconds, "to describe": serialized, "MB described": _megabytes(sent)}


def tick_sensors() -> dict[str, Any]:
    """A tick of each sensor of the study."""
    located = getattr(definitions, STUDY)
    found = {}
    with dg.DagsterInstance.get() as instance:
        for sensor in located.sensors:
            with dg.build_sensor_context(instance) as context:
                found[sensor.name] = clocked(lambda s=sensor, c=context: s(c))[1]
    return found


def ask_partitions() -> dict[str, Any]:
    """Which partitions of an asset are materialized: by query, and as the interface keeps it."""
    study = load_study(Path(os.environ["PERSONA_ASSETS_DATA"], "studies", f"{STUDY}.yaml"))
    asset, key = Graph(study).assets["cell_outcomes"], dg.AssetKey([STUDY, "cell_outcomes"])
    with dg.DagsterInstance.get() as instance:
        done, query = clocked(lambda: instance.get_materialized_partitions(key))
        assert len(done) == len(study.cells), f"{len(done)} of {len(study.cells)} are recorded"
        page = partial(
            get_and_update_asset_status_cache_value, instance, key, partitions_definition(asset)
        )
        first, again = clocked(page)[1], clocked(page)[1]
    return {"query": query, "first page": first, "next page": again}


def _megabytes(text: str) -> float:
    return round(len(text.encode()) / 1e6, 2)


ONE: dict[str, Callable[[], dict[str, Any]]] = {
    "definitions": build_definitions,
    "tick": tick_sensors,
    "partitions": ask_partitions,
}
COMMANDS = {
    "status": ("persona_assets", "status", "--study", STUDY),
    "run": ("persona_assets", "run", "--study", STUDY),
    **{what: ("benchmarks.sizing", "one", what) for what in ONE},
}
DO = {"grow": print_growth, "requests": print_requests}

if __name__ == "__main__":
    main()
