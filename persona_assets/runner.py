"""``persona-assets run``: a study, cell after cell, in resident worker processes.

Each unit of work is one Dagster run on the instance of ``dagster.yaml``; the workers stay, so that
a model is loaded once a process and not once a run. Units start as soon as what they are made from
has landed. What is landed and up to date is not done again.
"""

from __future__ import annotations

import fnmatch
import multiprocessing as mp
import os
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Literal

from persona_assets import environment, gpus, residency
from persona_assets.asset_table import JOBS
from persona_assets.dagster_databases import (
    DatabaseUnusable,
    check_databases,
    databases_named,
    in_words,
)
from persona_assets.disk import DiskError
from persona_assets.environment import WORKER_TAG
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.pools import pool_of
from persona_assets.records import unrecorded
from persona_assets.release import release_read
from persona_assets.run_lock import only_run
from persona_assets.store import Ref, Store, StoreUnreachable
from persona_assets.study import Study, load_study


@dataclass(frozen=True, slots=True)
class Unit:
    """One Dagster run: a job, for one partition; ``refs`` is what it makes.

    ``again``: also what is up to date.
    """

    job: str
    key: str | None
    refs: tuple[Ref, ...]
    again: bool = False

    def __str__(self) -> str:
        if self.job == "cell":
            trains = self.refs[-1].asset == "checkpoint"
            return f"{self.refs[-1]}" if trains else str(self.key)
        one = self.key is not None or len(self.refs) == 1
        return str(self.refs[0]) if one else self.job


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a unit."""

    status: Literal["pending", "fresh", "done", "failed", "skipped"]
    seconds: float = 0.0
    error: str = ""
    run_id: str = ""


_PENDING = Outcome("pending")

#: What is made of all trained cells before the first is evaluated, where the engine fills a GPU as
#: training does: so a worker starts each of the two once, and not once a cell.
TRAINED_FIRST = ("training_dataset", "checkpoint")
_EVALUATED_LATER = frozenset({"baseline_outcomes", "cell_outcomes"})


@dataclass
class Plan:
    """The units of a run, and for each the units that it waits for."""

    units: list[Unit]
    waits_for: dict[Unit, set[Unit]]
    #: Units that train, in a study that evaluates nothing before they are done.
    training: frozenset[Unit] = frozenset()
    left_out: list[str] = field(default_factory=list)


def plan(graph: Graph, store: Store, cells: str = "*", up_to: str | None = None) -> Plan:
    """The units that make the cells matching the glob ``cells``, and what can follow from them.

    With ``up_to``, only what that asset is made from, and itself. A contrast is left out while any
    of its cells has neither landed nor is chosen, and so are the aggregates: an estimate over
    fewer cells than its definition is never made.

    Raises:
        ValueError: no cell matches, or there is no asset ``up_to``.
    """
    study = graph.study
    asked = _asked(graph, up_to)
    chosen = [cell for cell in study.cells if fnmatch.fnmatchcase(cell.key, cells)]
    if not chosen:
        raise ValueError(
            f"no cell of study {study.name} matches {cells!r}; keys are source.arm.seed, "
            f"such as {study.cells[0].key}"
        )
    keys = {cell.key for cell in chosen}
    freshness = Freshness(graph, store).read_ahead()
    available = keys | {
        cell.key
        for cell in study.cells
        if {freshness.state(Ref(a, cell.key)) for a in ("cell_outcomes", "cell_diagnostics")}
        == {"fresh"}
    }
    conditions = {cell.condition for cell in chosen}
    contrasts = [
        contrast.key
        for contrast in study.contrast_list
        if {cell.key for cell in study.contrast_cells(contrast)} <= available
    ]
    wanted: dict[str, Iterable[str | None]] = {
        "rationales": [c for c in study.conditions if c in conditions],
        "prior_checkpoints": [cell.key for cell in chosen if cell.origin == "carry_over"],
        "forced_rationales": study.forced_arms,
        "baseline": [None],
        "cell": [cell.key for cell in chosen],
        "contrasts": contrasts,
        "aggregates": [None] if len(available) == len(study.cells) else [],
    }
    units = [Unit("inputs", None, (Ref(name),)) for name in JOBS["inputs"].assets if name in asked]
    alone = study.evaluation.engine == "vllm"
    training = [name for name in TRAINED_FIRST if name in asked] if alone else []
    first: list[Unit] = []
    for job, job_keys in wanted.items():
        names = [name for name in JOBS[job].assets if name in asked]
        if job == "baseline" and training:
            first = [
                Unit("cell", cell.key, tuple(Ref(name, cell.key) for name in training))
                for cell in chosen
                if cell.origin == "trained"
            ]
            units += first
        made = {ref for unit in units for ref in unit.refs}
        for key in job_keys:
            if refs := tuple(ref for ref in (Ref(n, key) for n in names) if ref not in made):
                units.append(Unit(job, key, refs))
    maker = {ref: unit for unit in units for ref in unit.refs}
    waits_for = {
        unit: {
            maker[upstream]
            for ref in unit.refs
            for upstream in graph.upstream(ref)
            if upstream in maker and maker[upstream] is not unit
        }
        for unit in units
    }
    left_out = [
        c.key
        for c in study.contrast_list
        if c.key not in contrasts and "contrast_estimate" in asked
    ]
    if len(available) < len(study.cells) and asked & set(JOBS["aggregates"].assets):
        left_out.append(
            f"{up_to or 'the report'} ({len(study.cells) - len(available)} cells are missing)"
        )
    return Plan(units, waits_for, frozenset(first), left_out)


def default_workers(study: Study, up_to: str | None = None) -> int:
    """How many workers to start: one a free GPU where they want one, else one a processor.

    Raises:
        ValueError: there is no asset ``up_to``, or other processes hold every GPU.
    """
    asked = _asked(Graph(study), up_to)
    if any(pool_of(asset, study) == "gpu" for asset in asked):
        free = len(gpus.unleased())
        if not free and gpus.visible():
            raise ValueError(
                "other processes hold every GPU (see the data folder's gpus/): wait for them, or "
                "stop the engine server while training"
            )
        return max(1, free)
    return min(environment.processors(), 8)


def _asked(graph: Graph, up_to: str | None) -> frozenset[str]:
    """The assets to be made: all, or what ``up_to`` is made from and itself."""
    if up_to in graph.assets and graph.assets[up_to].group == "publish":
        raise ValueError(f"{up_to} is made by `persona-assets publish`")
    try:
        return frozenset(graph.assets) if up_to is None else graph.ancestors(up_to)
    except KeyError as error:
        raise ValueError(error.args[0]) from error


def run(
    study_name: str,
    cells: str,
    workers: int,
    up_to: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[Unit, Outcome]:
    """Make what is not up to date, with ``workers`` processes; returns what became of each unit.

    Raises:
        ValueError: no cell matches, or there is no asset ``up_to``.
        As :func:`execute`.
    """
    study = load_study(environment.study_file(study_name))
    return execute(study, lambda graph, store: plan(graph, store, cells, up_to), workers, say)


def execute(
    study: Study,
    planned: Callable[[Graph, Store], Plan],
    workers: int,
    say: Callable[[str], None] = print,
) -> dict[Unit, Outcome]:
    """Make what is not up to date of a plan, which is asked for once nobody else is at work.

    A unit whose worker dies is tried once more in a new worker; one that fails lets the units
    that wait for it be skipped, and the others go on.

    Raises:
        AlreadyRunning: another process is running this study.
        DiskError: the store or Dagster's databases cannot be written.
        DatabaseUnusable: Dagster's database is damaged, or does not answer.
    """
    import dagster as dg

    graph, store = Graph(study), open_store(study.name)
    store.require_writable()
    check_databases()
    with only_run(store), databases_named():
        release_read(graph, store)  # of a run that was killed
        todo = planned(graph, store)
        _fail_lost_runs(study.name)
        freshness = Freshness(graph, store).read_ahead()
        with dg.DagsterInstance.get() as instance:
            untold = unrecorded(freshness, instance, [ref for u in todo.units for ref in u.refs])
        outcomes: dict[Unit, Outcome] = {
            unit: Outcome("fresh")
            for unit in todo.units
            if not unit.again
            and all(freshness.state(ref) == "fresh" and ref not in untold for ref in unit.refs)
        }
        for name in todo.left_out:
            say(f"left out for want of what it is made from: {name}")
        pending = [unit for unit in todo.units if unit not in outcomes]
        if pending:
            say(f"{len(pending)} runs to do, {len(outcomes)} up to date; {workers} workers")
            try:
                _Dispatcher(study.name, todo, outcomes, say).drain(pending, workers)
            finally:
                _fail_lost_runs(study.name)
            release_read(graph, store)
        else:
            say(f"nothing to do: all {len(outcomes)} runs of study {study.name} are up to date")
    return outcomes


class _Worker:
    """A resident process and the pipe to it."""

    def __init__(self, study_name: str):
        context = mp.get_context("spawn")  # torch's thread pools do not survive a fork
        self.pipe, theirs = context.Pipe()
        # No daemon in multiprocessing's sense: those may have no child, and vLLM's engine is one.
        self.process = context.Process(target=_work, args=(theirs, study_name))
        self.process.start()
        theirs.close()
        self.unit: Unit | None = None

    def start(self, unit: Unit) -> None:
        """Hand it a unit; raises ConnectionError if the process has died."""
        self.pipe.send(unit)
        self.unit = unit

    def stop(self) -> None:
        self.pipe.close()
        self.process.join(timeout=30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class _Dispatcher:
    """Hands ready units to idle workers until none is left."""

    def __init__(
        self,
        study_name: str,
        todo: Plan,
        outcomes: dict[Unit, Outcome],
        say: Callable[[str], None],
    ):
        self.study_name, self.todo, self.outcomes, self.say = study_name, todo, outcomes, say
        self.retried: set[Unit] = set()
        self.progress = _Progress(todo, outcomes)
        self.workers: list[_Worker] = []

    def drain(self, pending: list[Unit], count: int) -> None:
        """Make ``pending`` with at most ``count`` workers; empties the list."""
        try:
            while pending or any(worker.unit for worker in self.workers):
                self._skip_hopeless(pending)
                for unit in self._ready(pending):
                    worker = self._idle_worker(count)
                    if worker is None:
                        break
                    self._start(worker, unit, pending)
                busy = {worker.pipe: worker for worker in self.workers if worker.unit}
                # Nothing is at work where the last failure left only skips.
                for pipe in wait(list(busy)) if busy else ():
                    self._receive(busy[pipe], pending)
        finally:
            for worker in self.workers:
                worker.stop()

    def _idle_worker(self, count: int) -> _Worker | None:
        """A worker without a unit, a new one if there may be more; None if all are busy."""
        for worker in self.workers:
            if worker.unit is None:
                return worker
        if len(self.workers) == count:
            return None
        self.workers.append(_Worker(self.study_name))
        return self.workers[-1]

    def _start(self, worker: _Worker, unit: Unit, pending: list[Unit]) -> None:
        try:
            worker.start(unit)
            pending.remove(unit)
        except ConnectionError:  # it died idle; the unit stays pending for another
            self.say(f"an idle worker died (exit code {self._dismiss(worker)})")

    def _dismiss(self, worker: _Worker) -> int | None:
        """Take leave of a dead worker; its exit code."""
        self.workers.remove(worker)
        worker.stop()
        return worker.process.exitcode

    def _ready(self, pending: list[Unit]) -> list[Unit]:
        """What may start: what it waits for is there, and all training that comes first started."""
        training = not self.todo.training.isdisjoint(pending)
        return [
            unit
            for unit in pending
            if all(
                self.outcomes.get(other, _PENDING).status in ("done", "fresh")
                for other in self.todo.waits_for[unit]
            )
            and not (training and _EVALUATED_LATER & {ref.asset for ref in unit.refs})
        ]

    def _skip_hopeless(self, pending: list[Unit]) -> None:
        """Skip what waits for something that failed; repeated, since skips make skips."""
        while hopeless := [
            unit
            for unit in pending
            if any(
                self.outcomes.get(other, _PENDING).status in ("failed", "skipped")
                for other in self.todo.waits_for[unit]
            )
        ]:
            for unit in hopeless:
                pending.remove(unit)
                self._finish(unit, Outcome("skipped"))

    def _receive(self, worker: _Worker, pending: list[Unit]) -> None:
        """Take a busy worker's result, or its death."""
        unit, worker.unit = worker.unit, None
        try:
            self._finish(unit, worker.pipe.recv())
        except (EOFError, ConnectionError):
            why = f"its worker died (exit code {self._dismiss(worker)})"
            _fail_lost_runs(self.study_name, worker.process.pid)
            if unit in self.retried:
                self._finish(unit, Outcome("failed", error=f"{why}, twice"))
            else:
                self.retried.add(unit)
                pending.insert(0, unit)
                self.say(f"{unit}: {why}; it is tried once more")

    def _finish(self, unit: Unit, outcome: Outcome) -> None:
        self.outcomes[unit] = outcome
        self.say(self.progress.line(unit, outcome))


class _Progress:
    """Cells done, their rate, and the time that is left at that rate."""

    def __init__(self, todo: Plan, outcomes: dict[Unit, Outcome]):
        self.outcomes = outcomes
        units = [unit for unit in todo.units if unit.job == "cell"]
        #: The last unit of each cell; where there are two, the first one trains.
        self.cells = list({unit.key: unit for unit in units}.values())
        self.done_before = sum(unit in outcomes for unit in self.cells)
        self.first_cell: float | None = None

    def line(self, unit: Unit, outcome: Outcome) -> str:
        now = time.monotonic()
        ends_cell = unit in self.cells
        if ends_cell and outcome.status == "done" and self.first_cell is None:
            self.first_cell = now - outcome.seconds
        finished = sum(cell in self.outcomes for cell in self.cells)
        cells = f"[{finished:>3}/{len(self.cells)} cells] " if self.cells else ""
        text = f"{cells}{unit}  {outcome.status}"
        if outcome.status == "done":
            text += f" in {outcome.seconds:.1f} s"
        if outcome.error:
            text += f"\n{outcome.error}"
        here = finished - self.done_before
        if ends_cell and self.first_cell is not None and here:
            rate = here / max(now - self.first_cell, 1e-9)
            left = (len(self.cells) - finished) / rate
            text += f"  ({60 * rate:.1f} cells/min, {left / 60:.1f} min left)"
        return text


def _work(pipe: Connection, study_name: str) -> None:
    """A worker: makes units until its pipe is closed."""
    import dagster as dg

    _die_with_parent()
    environment.prepare()
    _hush()
    from persona_assets.definitions import study_definitions

    study = load_study(environment.study_file(study_name))
    definitions = study_definitions(study)
    graph, store = Graph(study), open_store(study.name)
    try:
        with databases_named(), dg.DagsterInstance.get() as instance:
            while True:
                unit = pipe.recv()
                pipe.send(attempt(unit, definitions, graph, store, instance))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the dispatcher has gone, or wants us to
    finally:
        residency.release()


def _die_with_parent() -> None:
    """End this process when the dispatcher ends, however it ends: no orphans on a GPU."""
    parent = mp.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _hush() -> None:
    """Keep the model libraries' progress bars and deprecations out of our progress lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def attempt(unit: Unit, definitions, graph: Graph, store: Store, instance) -> Outcome:
    """Make a unit; what is raised on the way, of Dagster's databases above all, is an outcome."""
    try:
        with databases_named():
            return _make(unit, definitions, graph, store, instance)
    except (DatabaseUnusable, DiskError, StoreUnreachable) as error:
        return Outcome("failed", error=f"  {error}")
    except Exception:
        return Outcome("failed", error=traceback.format_exc())


def _make(unit: Unit, definitions, graph: Graph, store: Store, instance) -> Outcome:
    """One Dagster run over those of the unit's partitions that are not up to date, or on record."""
    import dagster as dg

    freshness = Freshness(graph, store)
    untold = unit.refs if unit.again else unrecorded(freshness, instance, unit.refs)
    assets = [r.asset for r in unit.refs if freshness.state(r) != "fresh" or r in untold]
    if not assets:
        return Outcome("fresh")
    started = time.perf_counter()
    result = definitions.resolve_job_def(unit.job).execute_in_process(
        instance=instance,
        partition_key=unit.key,
        asset_selection=[dg.AssetKey([graph.study.name, asset]) for asset in assets],
        raise_on_error=False,
        run_config={
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            "ops": {
                f"{graph.study.name}__{asset}": {"config": {"force": unit.again}}
                for asset in assets
            },
        },
        tags={WORKER_TAG: environment.process_name()},
    )
    seconds = time.perf_counter() - started
    after = Freshness(graph, store)
    manifests = [manifest for ref in unit.refs if (manifest := after.manifest(ref))]
    if result.success:
        ours = any(manifest.provenance.run_id == result.run_id for manifest in manifests)
        # Else this run has kept what another made, and told Dagster of it.
        return Outcome("done" if ours else "fresh", seconds, run_id=result.run_id)
    found = [
        f"  {manifest.ref} failed {audit.name}: {audit.observed}; asked for: {audit.threshold}. "
        f"{audit.remedy}"
        for manifest in manifests
        if manifest.provenance.run_id == result.run_id
        for audit in manifest.blocking_failures
    ] or [f"  {in_words(message)}" for message in _messages(result)]
    where = f"  (Dagster run {result.run_id} has the whole log)"
    return Outcome("failed", seconds, "\n".join([*found, where]), result.run_id)


def _messages(result) -> Iterator[str]:
    """What the asset raised in each failed step: Dagster wraps it once, libraries lie below."""
    for event in result.all_events:
        if event.is_step_failure and event.event_specific_data.error:
            error = event.event_specific_data.error
            yield (error.cause or error).message.strip()


def _fail_lost_runs(study_name: str, pid: int | None = None) -> None:
    """Mark runs that no worker is at any more as failed: they would fill the UI's run queue.

    The run lock is ours, so every unfinished run of a worker of this machine is lost but those of
    our own workers; ``pid`` names the one of those that has died. Also lets Dagster make its tables
    before several workers try to at once.
    """
    import dagster as dg

    from persona_assets.launcher import was_launched

    statuses = dg.DagsterRunStatus
    unfinished = dg.RunsFilter(
        tags={"study": study_name} | ({WORKER_TAG: environment.process_name(pid)} if pid else {}),
        statuses=[statuses.NOT_STARTED, statuses.STARTING, statuses.STARTED],
    )
    with dg.DagsterInstance.get() as instance:
        for lost in instance.get_runs(unfinished):
            worker = lost.tags.get(WORKER_TAG)
            if worker and environment.is_of_this_machine(worker) and not was_launched(lost):
                instance.report_run_failed(lost, "The worker process died.")
