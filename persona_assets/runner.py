"""``persona-assets run``: a study, cell after cell, in resident worker processes.

Each unit of work is one Dagster run on the instance of ``dagster.yaml``; the workers stay, so that
a model is loaded once a process and not once a run. Units start as soon as what they are made from
has landed. What is landed and up to date is not done again.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Callable
from multiprocessing.connection import wait

from persona_assets import environment, gpus
from persona_assets.dagster_databases import check_databases, databases_named
from persona_assets.environment import WORKER_TAG
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.pools import pool_of
from persona_assets.records import unrecorded
from persona_assets.release import release_read
from persona_assets.run_lock import only_run
from persona_assets.run_plan import Plan, Unit, asked_for, plan
from persona_assets.run_worker import Outcome, work
from persona_assets.store import Store
from persona_assets.study import Study, load_study

_PENDING = Outcome("pending")
#: What waits until all training that comes first has been started.
_EVALUATED_LATER = frozenset({"baseline_outcomes", "cell_outcomes"})


def default_workers(study: Study, up_to: str | None = None) -> int:
    """How many workers to start: one a free GPU where they want one, else one a processor.

    Raises:
        ValueError: there is no asset ``up_to``, or other processes hold every GPU.
    """
    asked = asked_for(Graph(study), up_to)
    if any(pool_of(asset, study) == "gpu" for asset in asked):
        free = len(gpus.unleased())
        if not free and gpus.visible():
            raise ValueError(
                "other processes hold every GPU (see the data folder's gpus/): wait for them, or "
                "stop the engine server while training"
            )
        return max(1, free)
    return min(environment.processors(), 8)


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
        self.process = context.Process(target=work, args=(theirs, study_name))
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
