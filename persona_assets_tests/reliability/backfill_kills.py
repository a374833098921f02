"""Daemon and webserver killed in the middle of a backfill from the UI, and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from persona_assets.asset_table import JOBS
from persona_assets.reporting.so_far import SO_FAR
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver, backfilled, start_backfill
from persona_assets_tests.reliability import whole
from persona_assets_tests.reliability.table import Row

_TIMES, _CELLS = 3, 4
_CHAIN = JOBS["cell"].assets
_PATIENCE = 600.0


def row(folder: Path, undisturbed: Project, seed: int) -> Row:
    """A backfill of a third of the cells, killed once; every other time with all of its runs."""
    done = Row(
        "SIGKILL of daemon and webserver in a backfill, alone or with all of its runs",
        recovered_by="`persona-assets ui`: it goes on by itself",
    )
    took = []
    for i in range(_TIMES):
        rng = random.Random(f"{seed}/backfill/{i}")
        project = undisturbed.copy(folder / f"backfill-{i}")
        began = time.monotonic()
        done.count(killed_in_a_backfill(project, undisturbed, rng, with_runs=i % 2 == 0))
        took.append(time.monotonic() - began)
    done.seen = f"complete after {min(took):.0f} to {max(took):.0f} s"
    return done


def killed_in_a_backfill(
    project: Project, undisturbed: Project, rng: random.Random, *, with_runs: bool
) -> str | None:
    """Kill what is at work on a backfill at a random moment; start it again; what is wrong then."""
    store = project.store
    cells = rng.sample([cell.key for cell in project.study.cells], _CELLS)
    chain = [Ref(asset, cell) for cell in cells for asset in _CHAIN]
    lost = [*chain, *map(Ref, ("number_ledger", "warehouse", "report")), SO_FAR]
    versions = {ref: store.landed(ref).data_version for ref in chain}
    for ref in lost:
        shutil.rmtree(store.folder(ref), ignore_errors=True)  # there may be no page yet
    before = whole.landed_files(project, lost)
    first = Webserver(project)
    try:
        first.wait_until_up()
        backfill = start_backfill(first, _CHAIN, cells)
        # Random: so many have landed, and a little later.
        landings = rng.randrange(1, len(chain))
        _wait(lambda: sum(store.manifest(ref) is not None for ref in chain) >= landings)
        time.sleep(rng.uniform(0, 3))
        if status(first, backfill) != "REQUESTED":
            return "the backfill was over before the kill"
    finally:
        for pid in whole.processes(project) if with_runs else whole.children(first.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.process.wait(timeout=120)
        first.log.close()
    if problem := _looked_at(project, before, lost):
        return problem
    try:
        with Webserver(project) as again:
            _wait(lambda: status(again, backfill) != "REQUESTED" and not _behind(project))
            ended = status(again, backfill)
    except TimeoutError as error:
        return f"{error}: {_behind(project)}"
    if ended != "COMPLETED_SUCCESS":
        return f"the backfill ended as {ended}"
    if other := [str(ref) for ref in chain if store.landed(ref).data_version != versions[ref]]:
        return f"came out otherwise: {other}"
    return (
        _looked_at(project, before, lost)
        or whole.debris(project)
        or whole.other_rows(project, undisturbed)
        or whole.orphans(project)
    )


def status(server: Webserver, backfill: str) -> str:
    """The state of a backfill."""
    return backfilled(server, backfill)["status"]


def _looked_at(project: Project, before: dict[str, str], lost: list[Ref]) -> str | None:
    after = whole.landed_files(project, lost)
    return whole.broken(project) or whole.changed(before, after)


def _behind(project: Project) -> list[str]:
    return [str(ref) for ref, state in project.states().items() if state != "fresh"]


def _wait(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not after {_PATIENCE:g} s")
        time.sleep(0.5)
