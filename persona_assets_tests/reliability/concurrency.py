"""Many at once: evaluations beside readers and rebuilds, and two that make one partition."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project, make
from persona_assets_tests.reliability import whole
from persona_assets_tests.reliability.table import Row

_ROUNDS, _EVALUATIONS = 2, 8
#: Rebuilds of the warehouse at least; as many as there is time for while evaluations are at work.
_REBUILDS = 2
#: What two make at once, and how often: the first to be at it lands it, or is killed.
_SAME = ("training_dataset", "checkpoint", "cell_outcomes", "warehouse")
_PATIENCE = 900.0
_WAREHOUSE = Ref("warehouse")
#: What everybody who reads the warehouse must see, whichever build it is of.
_READ = "SELECT count(*), sum(is_correct::INT), count(DISTINCT cell), sum(len(rationale)) FROM {}"


@dataclass
class Started:
    """A command at work on a study, and what it has said so far."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8")

    def wait_for(self, *words: str) -> bool:
        """Wait until it says one of these; False if it ends without."""
        deadline = time.monotonic() + _PATIENCE
        while not any(word in self.said for word in words):
            if self.process.poll() is not None or time.monotonic() > deadline:
                return any(word in self.said for word in words)
            time.sleep(0.1)
        return True


@contextmanager
def started(project: Project, command: Sequence[str], name: str) -> Iterator[Started]:
    """A command in a process of its own, which is no longer there afterwards."""
    log = project.data / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=project.environment,
            cwd=project.data,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Started(process, log)
    finally:
        process.kill()
        process.wait()


@dataclass
class Reader:
    """Reads the warehouse again and again, each time through a connection that it keeps a while.

    Attributes:
        seen: What the queries gave; one and the same, since every build is of the same study.
    """

    project: Project
    seen: set[tuple] = field(default_factory=set)
    n: int = 0
    problem: str | None = None

    def __enter__(self) -> Reader:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _read(self) -> None:
        try:
            with self.project.warehouse() as kept:  # from before the first rebuild to the end
                while not self._stop.wait(0.2):
                    with self.project.warehouse() as db:
                        for one in (kept, db):
                            self.seen.add(one.execute(_READ.format("outcomes")).fetchone())
                            self.n += 1
        except (duckdb.Error, OSError, RuntimeError) as error:
            self.problem = f"a reader: {error}"


def evaluated_while_read_and_rebuilt(
    project: Project, undisturbed: Project, rng: random.Random, evaluations: int = _EVALUATIONS
) -> tuple[list[str | None], Reader]:
    """Evaluate so many cells again at once, while the warehouse is read and rebuilt.

    Returns:
        What went wrong with each evaluation and each rebuild, and the reader.
    """
    store = project.store
    cells = rng.sample([cell.key for cell in project.study.cells], evaluations)
    refs = [Ref("cell_outcomes", cell) for cell in cells]
    before = {ref: store.landed(ref) for ref in refs}
    kept = whole.landed_files(project, [*refs, _WAREHOUSE])
    found: list[str | None] = []
    with ExitStack() as stack:
        reader = stack.enter_context(Reader(project))
        at_work = {
            ref: stack.enter_context(
                started(project, project.materialization(ref, force=True), f"evaluation-{i}")
            )
            for i, ref in enumerate(refs)
        }
        rebuild = project.materialization(_WAREHOUSE, force=True)
        while len(found) < _REBUILDS or any(o.process.poll() is None for o in at_work.values()):
            with started(project, rebuild, "rebuild") as rebuilding:
                failed = rebuilding.process.wait(timeout=_PATIENCE)
            said = f"a rebuild ended with status {failed}: {rebuilding.said[-500:]}"
            found.append(said if failed else whole.other_rows(project, undisturbed))
    for ref, one in at_work.items():
        manifest = store.landed(ref)
        if one.process.returncode != 0:
            found.append(f"{ref} ended with {one.process.returncode}: {one.said[-500:]}")
        elif manifest.provenance.run_id == before[ref].provenance.run_id:
            found.append(f"{ref} was not made again")
        elif manifest.data_version != before[ref].data_version:
            found.append(f"{ref} came out otherwise")
        else:
            found.append(whole.broken(project))
    found.append(
        reader.problem
        or (f"readers saw {reader.seen}" if len(reader.seen) != 1 else None)
        or whole.changed(kept, whole.landed_files(project, [*refs, _WAREHOUSE]))
        or whole.debris(project)
    )
    return found, reader


def made_by_two(project: Project, ref: Ref, *, first_dies: bool) -> str | None:
    """Let two make one partition: the second must wait for the first, and say what came of it.

    The first is stopped while it is at it, until the second waits; then it goes on, or is killed.
    """
    store, command = project.store, project.materialization(ref)
    version = store.landed(ref).data_version
    shutil.rmtree(store.folder(ref))
    before = whole.landed_files(project, [ref])
    with started(project, command, "first") as first:
        deadline = time.monotonic() + _PATIENCE
        while not list(store.folder(ref).glob(".draft-*")):
            if time.monotonic() > deadline or first.process.poll() is not None:
                return f"{ref}: the first did not begin: {first.said[-500:]}"
            time.sleep(0.005)
        first.process.send_signal(signal.SIGSTOP)
        with started(project, command, "second") as second:
            waits = second.wait_for("is being made by another process")
            first.process.send_signal(signal.SIGKILL if first_dies else signal.SIGCONT)
            ended = [one.process.wait(timeout=_PATIENCE) for one in (first, second)]
    landed = store.manifest(ref)
    if not waits:
        return f"{ref}: the second did not say that it waits: {second.said[-500:]}"
    if ended != [-signal.SIGKILL if first_dies else 0, 0]:
        return f"{ref}: ended with {ended}: {second.said[-500:]}"
    if landed is None:
        return f"{ref}: has not landed"
    kept = f"kept as run {landed.provenance.run_id} made it" in second.said
    if kept == first_dies:
        return f"{ref}: the second {'kept' if kept else 'made'} it"
    if ref.key and landed.data_version != version:
        return f"{ref}: came out otherwise"
    return (
        whole.broken(project)
        or whole.changed(before, whole.landed_files(project, [ref]))
        or whole.debris(project)
    )


def two_runs(project: Project, ref: Ref) -> str | None:
    """A second ``persona-assets run`` while one is at work is refused, and the first completes."""
    shutil.rmtree(project.store.folder(ref))
    command = project.command("run", "--study", "tiny", "--workers", "1")
    with started(project, command, "first") as first:
        if not first.wait_for("runs to do"):
            return f"the first run did not begin: {first.said}"
        second = project.run("run", "--study", "tiny")
        status = first.process.wait(timeout=_PATIENCE)
    if second.returncode != 1 or "another `persona-assets run` of study tiny" not in second.stderr:
        return f"the second run: {second.stdout}{second.stderr}"
    if status != 0 or set(project.states().values()) != {"fresh"}:
        return f"the first run: {first.said}"
    return whole.broken(project) or whole.orphans(project)


def rows(folder: Path, seed: int) -> list[Row]:
    """Rounds of evaluations beside readers and rebuilds; pairs of each kind, killed and not."""
    undisturbed = Project(folder / "undisturbed")
    make(undisturbed)
    return beside_each_other(undisturbed, undisturbed.copy(folder / "copy"), seed)


def beside_each_other(undisturbed: Project, project: Project, seed: int) -> list[Row]:
    """The rows."""
    many = Row(
        f"{_EVALUATIONS} processes evaluate, one rebuilds the warehouse, one reads it",
        recovered_by="nothing to recover: renames, and readers keep the file they opened",
    )
    reads = 0
    for i in range(_ROUNDS):
        rng = random.Random(f"{seed}/many/{i}")
        found, reader = evaluated_while_read_and_rebuilt(project, undisturbed, rng)
        reads += reader.n
        for problem in found:
            many.count(problem)
    many.seen = f"{reads} reads"
    same = Row(
        "two processes make one partition at once",
        recovered_by="the second waits, and keeps what landed",
    )
    dead = Row(
        "the same, and the first is killed at it",
        recovered_by="the second takes its turn",
    )
    runs = Row("two `persona-assets run` of one study", recovered_by="the second is refused")
    for asset in _SAME:
        rng = random.Random(f"{seed}/same/{asset}")
        keys = [cell.key for cell in project.study.cells_of("trained")]
        ref = Ref(asset, None if asset == "warehouse" else rng.choice(keys))
        same.count(made_by_two(project, ref, first_dies=False))
        dead.count(made_by_two(project, ref, first_dies=True))
        if ref.key:
            runs.count(two_runs(project, ref))
    return [many, same, dead, runs]
