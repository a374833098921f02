"""SIGKILL at random moments: of what makes a partition, and of daemon and webserver.

A partition of a complete tiny study is removed and made again by ``persona-assets run``, whose
worker is killed while it makes it; the new worker that tries it once more is killed too, along with
the command or by that command's own death. Then one plain run must complete. Others are killed as
``dagster asset materialize``. After each kill the store is looked at, and at the end its warehouse.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import dagster as dg

from persona_assets import environment
from persona_assets.graph import Graph
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project, make
from persona_assets_tests.reliability import backfill_kills, whole
from persona_assets_tests.reliability.table import Row

#: What is killed, by the asset that is being made then.
KINDS = {
    "training_dataset": "a training dataset",
    "checkpoint": "a checkpoint",
    "cell_outcomes": "a cell's outcomes",
    "warehouse": "the warehouse",
    "report": "the report",
}
#: Kills of a kind: two in each of these commands, and one in each of Dagster's own.
_RUNS, _MATERIALIZATIONS = 6, 2
#: What comes out byte by byte as it was; a DuckDB file and what quotes its hash do not.
_SAME_BYTES = frozenset({"training_dataset", "checkpoint", "cell_outcomes"})
_WAREHOUSE = Ref("warehouse")
_PATIENCE = 900.0


@dataclass
class Bench:
    """A copy of the complete study, on which one thing after another is killed.

    Attributes:
        undisturbed: What the warehouse must be like in the end.
        seconds: The work of making a partition of an asset, in seconds of a processor.
        moments: For each kill of an asset the share of that work that was done, and whether the
            partition had landed.
    """

    project: Project
    undisturbed: Project
    seconds: dict[str, float] = field(default_factory=dict)
    moments: dict[str, list[tuple[float, bool]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph: Graph = self.project.graph
        self.log = (self.project.data / "kills.log").open("a")

    def start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        """A command on the study, in a session of its own."""
        return subprocess.Popen(
            command,
            env=self.project.environment,
            cwd=self.project.data,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self) -> list[str]:
        """The command that makes what is not up to date."""
        return self.project.command("run", "--study", "tiny", "--workers", "1")

    def said(self) -> str:
        """The end of what the commands said."""
        return (self.project.data / "kills.log").read_text("utf-8")[-600:]

    def victim(self, asset: str, rng: random.Random) -> Ref:
        """A partition of the asset; of a checkpoint, one that is trained."""
        keys = self.graph.assets[asset].keys
        if asset == "checkpoint":
            keys = [cell.key for cell in self.graph.study.cells_of("trained")]
        return Ref(asset, rng.choice(keys) if keys else None)

    def wait(self, ref: Ref, process: subprocess.Popen[bytes], seen: set[str]) -> bool:
        """Wait until a draft of ``ref`` that is not ``seen`` is being written; False if none is."""
        folder, deadline = self.project.store.folder(ref), time.monotonic() + _PATIENCE
        while process.poll() is None and time.monotonic() < deadline:
            if drafts := {p.name for p in folder.glob(".draft-*")} - seen:
                seen |= drafts
                return True
            time.sleep(0.005)
        return False

    def sleep(self, ref: Ref, pid: int, rng: random.Random) -> float:
        """Wait for a uniformly drawn share of the work of making a partition; the share.

        Of the work, in seconds of a processor: how long it takes depends on who else is at work.
        """
        folder, share = self.project.store.folder(ref), rng.uniform(0, 1.1)
        began = whole.worked(pid)
        while whole.worked(pid) < began + share * self.seconds[ref.asset]:
            if not any(folder.glob(".draft-*")):
                time.sleep(rng.uniform(0, 0.5))  # landed: Dagster is told of it now
                return 1.0
            time.sleep(0.005)
        return share

    def measure(self) -> None:
        """Make one partition of each kind, undisturbed, and note how long each works at it."""
        cell, store = self.graph.study.cells_of("trained")[0].key, self.project.store
        refs = [Ref(asset, cell if self.graph.assets[asset].keys else None) for asset in KINDS]
        for ref in refs:
            shutil.rmtree(store.folder(ref))
        process = self.start(self.run())
        for ref in refs:  # in the order in which they are made
            begins = self.wait(ref, process, set())
            worker = _worker(process.pid) or process.pid
            began = whole.worked(worker)
            while store.manifest(ref) is None:
                if not begins or process.poll() is not None:
                    raise RuntimeError(f"{ref} was not made: {self.said()}")
                time.sleep(0.005)
            self.seconds[ref.asset] = whole.worked(worker) - began
        if process.wait(timeout=_PATIENCE) != 0:
            raise RuntimeError(self.said())


@dataclass
class Trial:
    """One partition, removed and then killed while it is made again."""

    bench: Bench
    ref: Ref
    rng: random.Random

    def __post_init__(self) -> None:
        self.seen: set[str] = set()
        self.beside = [self.ref] if self.ref.asset in _SAME_BYTES else [_WAREHOUSE, Ref("report")]
        store = self.bench.project.store
        self.version = store.landed(self.ref).data_version
        shutil.rmtree(store.folder(self.ref))
        self.before = whole.landed_files(self.bench.project, self.beside)

    def killed_twice(self) -> list[str | None]:
        """Kill the worker of a run, then its successor with the command; then run it plainly."""
        bench, found = self.bench, []
        process = bench.start(bench.run())
        workers = [lambda: _worker(process.pid)]
        second = [lambda: process.pid]  # the worker goes with it
        if self.rng.random() < 0.5:
            second = [*workers, *second]
        for targets in (workers, second):
            if bench.wait(self.ref, process, self.seen):
                share = bench.sleep(self.ref, _worker(process.pid) or process.pid, self.rng)
                self._kill(targets, share, found)
        return self._mended(process, found)

    def killed_by_itself(self) -> list[str | None]:
        """Kill Dagster's own command."""
        bench, found = self.bench, []
        process = bench.start(bench.project.materialization(self.ref))
        if bench.wait(self.ref, process, self.seen):
            share = bench.sleep(self.ref, process.pid, self.rng)
            self._kill([lambda: process.pid], share, found)
        return self._mended(process, found)

    def _kill(
        self, targets: Sequence[Callable[[], int | None]], share: float, found: list[str | None]
    ) -> None:
        """Kill, and look at what there is; unless nothing is left to be killed."""
        pids = [pid for target in targets if (pid := target()) and whole.running(pid, "python")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if pids:
            landed = self.bench.project.store.manifest(self.ref) is not None
            self.bench.moments.setdefault(self.ref.asset, []).append((share, landed))
            found.append(self._looked_at())

    def _looked_at(self) -> str | None:
        after = whole.landed_files(self.bench.project, self.beside)
        problem = whole.broken(self.bench.project) or whole.changed(self.before, after)
        return problem and f"{self.ref}, after a kill: {problem}"

    def _mended(
        self, process: subprocess.Popen[bytes], found: list[str | None]
    ) -> list[str | None]:
        """What was found at each kill, and once more after a plain run, which counts for all."""
        bench, project = self.bench, self.bench.project
        try:
            process.wait(timeout=_PATIENCE)
        finally:
            problem = whole.orphans(project)
        if status := bench.start(bench.run()).wait(timeout=_PATIENCE):
            problem = problem or f"a plain run ends with status {status}: {bench.said()}"
        problem = problem or self._looked_at() or whole.debris(project) or self._unlike()
        problem = problem or unfinished_runs(project) or unknown(project, self.ref)
        return [f"{self.ref}: {problem}" if problem else one for one in found]

    def _unlike(self) -> str | None:
        project = self.bench.project
        if stale := {str(ref) for ref, state in project.states().items() if state != "fresh"}:
            return f"not up to date after a plain run: {sorted(stale)[:5]}"
        if self.ref.asset not in _SAME_BYTES:
            return whole.other_rows(project, self.bench.undisturbed)
        now = project.store.landed(self.ref).data_version
        return None if now == self.version else f"came out as {now}, was {self.version}"


def unfinished_runs(project: Project) -> str | None:
    """Runs of workers that Dagster still takes for running, though nobody is at work."""
    with dg.DagsterInstance.local_temp(str(project.data / "dagster")) as dagster:
        statuses = [dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED]
        left = dagster.get_runs(dg.RunsFilter(statuses=statuses))
    left = [run for run in left if environment.WORKER_TAG in run.tags]
    return f"run {left[0].run_id} counts as {left[0].status.value} for ever" if left else None


def unknown(project: Project, ref: Ref) -> str | None:
    """That Dagster's pages show what has landed: a kill may hit before it is told."""
    wanted = dg.AssetRecordsFilter(
        dg.AssetKey(["tiny", ref.asset]), asset_partitions=[ref.key] if ref.key else None
    )
    with dg.DagsterInstance.local_temp(str(project.data / "dagster")) as dagster:
        (latest,) = dagster.fetch_materializations(wanted, limit=1).records or (None,)
    shown = latest and latest.asset_materialization.metadata["data_version"].value
    landed = project.store.landed(ref).data_version
    return None if shown == landed else f"Dagster shows {shown}, {landed} has landed"


def _worker(pid: int) -> int | None:
    """The worker process of a run."""
    workers = (child for child in whole.children(pid) if whole.running(child, "spawn_main"))
    return next(workers, None)


def ends_as_undisturbed(bench: Bench) -> str | None:
    """That ledger and warehouse, made anew from all that was killed, have the same rows."""
    for name in ("number_ledger", "warehouse", "report"):
        shutil.rmtree(bench.project.store.folder(Ref(name)))
    if bench.start(bench.run()).wait(timeout=_PATIENCE) != 0:
        return bench.said()
    return whole.other_rows(bench.project, bench.undisturbed)


def killed_at(bench: Bench, asset: str, how: str, rng: random.Random) -> list[str | None]:
    """What was found at each of the kills of one command; tried again if none hit."""
    for _ in range(5):
        trial = Trial(bench, bench.victim(asset, rng), rng)
        if found := (trial.killed_twice if how == "run" else trial.killed_by_itself)():
            return found
    return [f"{asset}: five commands ended before they could be killed"]


def rows(folder: Path, seed: int) -> list[Row]:
    """At least 12 kills of each kind, on as many copies of the study as there are processors."""
    undisturbed = Project(folder / "undisturbed")
    make(undisturbed)
    return [*killed(folder, undisturbed, seed), backfill_kills.row(folder, undisturbed, seed)]


def killed(folder: Path, undisturbed: Project, seed: int) -> list[Row]:
    """The rows of the kinds."""
    commands = ["run"] * _RUNS + ["dagster"] * _MATERIALIZATIONS
    trials = [(asset, i, how) for i, how in enumerate(commands) for asset in KINDS]
    n = environment.processors()
    first = Bench(undisturbed.copy(folder / "measured"), undisturbed)
    first.measure()

    def share(i: int) -> list[tuple[str, list[str | None], Bench]]:
        bench = Bench(undisturbed.copy(folder / f"copy-{i}"), undisturbed, first.seconds)
        found = [
            (asset, killed_at(bench, asset, how, random.Random(f"{seed}/{asset}/{j}")), bench)
            for asset, j, how in trials[i::n]
        ]
        return [*found, ("", [ends_as_undisturbed(bench)], bench)]

    with ThreadPoolExecutor(n) as threads:
        found = list(chain.from_iterable(threads.map(share, range(n))))
    made = []
    for asset, what in KINDS.items():
        row = Row(f"SIGKILL while {what} is made", recovered_by="`persona-assets run`")
        for problem in chain.from_iterable(p for a, p, _ in found if a == asset):
            row.count(problem)
        benches = {id(bench): bench for _, _, bench in found}.values()
        shares, landed = zip(*(m for b in benches for m in b.moments.get(asset, [])), strict=True)
        row.seen = f"at {min(shares):.0%} to {max(shares):.0%} of the work, {sum(landed)} landed"
        made.append(row)
    anew = Row("ledger and warehouse made anew from what all these kills have left")
    for problem in chain.from_iterable(p for asset, p, _ in found if not asset):
        anew.count(problem)
    return [*made, anew]
