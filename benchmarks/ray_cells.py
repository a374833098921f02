"""Cells per minute as Ray jobs, by workers, beside the runner that keeps its processes.

    python -m benchmarks.ray_cells DATA --study tiny --cells 6

DATA is the data folder of a finished study of seconds a cell, the tiny one of the integration tests
or ``mini``; each round works on a copy of it. In one run, one after the other: ``persona-assets
run`` with 1, 2 and 4 workers, and a backfill of the same cells through ``deploy/ray`` (Postgres,
daemon, a Ray head that offers as many processors as there are workers, all on this machine). Where
a run's seconds go is read from Dagster's own records. Needs Debian's postgresql.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import dagster as dg

from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver, start_backfill
from persona_assets_tests.scale import grid
from persona_assets_tests.scale.cluster import Cluster
from persona_assets_tests.scale.grid import CHAIN
from persona_assets_tests.scale.postgres import Postgres

WORKERS = (1, 2, 4)


@dataclass(frozen=True)
class Round:
    """One way to make the cells.

    Attributes:
        wall: Seconds for all of them; of Ray without the start of cluster and interface.
        phases: What of a run's seconds was what, in the median.
    """

    engine: str
    workers: int
    cells: int
    wall: float
    phases: dict[str, float]
    load: float

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases.items())
        return (
            f"| {self.engine} | {self.workers} | {60 * self.cells / self.wall:.1f} "
            f"| {self.wall / self.cells:.1f} | {phases} | {self.load:.1f} |"
        )


def in_process(project: Project, keys: Sequence[str], workers: int) -> Round:
    """``persona-assets run``, its start included."""
    began = time.perf_counter()
    arguments = ("--study", project.name, "--up-to", "cell_diagnostics")
    done = project.run("run", *arguments, "--workers", str(workers), timeout=3600)
    wall = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    _complete(project, keys)
    seconds = [float(s) for s in re.findall(r"cell\S* .*done in ([\d.]+) s", done.stdout)]
    phases = {"at work": statistics.median(seconds)}
    return Round("`persona-assets run`", workers, len(keys), wall, phases, os.getloadavg()[0])


def on_ray(project: Project, keys: Sequence[str], workers: int, postgres: Postgres) -> Round:
    """A backfill through the daemon, from its button to its end."""
    home = {"DAGSTER_HOME": str(project.data)}
    with Cluster(project.environment | home | postgres.variables, cpus=workers) as cluster:
        more = postgres.variables | {"PERSONA_ASSETS_RAY": cluster.url}
        server = Webserver(project, _home(project.data.parent / "home", workers), **more)
        try:
            server.wait_until_up()
            cluster.wait_for(1)
            began = time.perf_counter()
            backfill = start_backfill(server, CHAIN, keys)
            grid.wait(lambda: grid.status(server, backfill) != "REQUESTED", 3600)
            wall = time.perf_counter() - began
            load = os.getloadavg()[0]
        finally:
            server.stop()
        with grid.instance(project, **more) as instance:
            phases = _phases(instance, backfill)
    _complete(project, keys)
    return Round("Ray", workers, len(keys), wall, phases, load)


def _home(folder: Path, workers: int) -> Path:
    """``deploy/ray`` for so many workers."""
    text = (PROJECT / "deploy" / "ray" / "dagster.yaml").read_text("utf-8")
    limits = ("max_concurrent_runs: 8", "limit: 6")
    for limit in limits:
        assert limit in text
        text = text.replace(limit, f"{limit.partition(':')[0]}: {workers}")
    folder.mkdir()
    (folder / "dagster.yaml").write_text(text, "utf-8")
    return folder


def _phases(instance: dg.DagsterInstance, backfill: str) -> dict[str, float]:
    """Medians over a backfill's runs: from Ray's hands to the first line, and from there on."""
    runs = instance.get_run_records(dg.RunsFilter(tags={"dagster/backfill": backfill}))
    stats = [instance.get_run_stats(run.dagster_run.run_id) for run in runs]
    return {
        "job's start": statistics.median(s.start_time - s.launch_time for s in stats),
        "at work": statistics.median(s.end_time - s.start_time for s in stats),
    }


def _complete(project: Project, keys: Sequence[str]) -> None:
    """See that all of it was made: else the seconds are not those of the cells."""
    if (there := grid.landed(project, keys)) != len(keys) * len(CHAIN):
        raise RuntimeError(f"only {there} of {len(keys) * len(CHAIN)} partitions have landed")


def main() -> None:
    """Print a line a round as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="The data folder of a finished study.")
    parser.add_argument("--study", default="tiny")
    parser.add_argument("--cells", type=int, default=6)
    arguments = parser.parse_args()
    finished = Project(arguments.data.resolve(), arguments.study)
    keys = grid.trained(finished, arguments.cells)
    print(f"{len(os.sched_getaffinity(0))} processors, {len(keys)} cells of {finished.name}")
    print(
        "| | workers | cells/min | s a cell | median s of a run | load |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for workers in WORKERS:
            for engine in ("process", "ray"):
                project = finished.copy(Path(folder, f"{engine}-{workers}", "data"))
                grid.unmake(project, keys)
                if engine == "process":
                    print(in_process(project, keys, workers), flush=True)
                    continue
                with Postgres() as postgres:
                    print(on_ray(project, keys, workers, postgres), flush=True)


if __name__ == "__main__":
    main()
