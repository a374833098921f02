"""Disks that are full, read-only or another's, and clocks that run backwards.

What cannot be made must say so, with path and need; whatever had landed is as it was; and once
the cause is gone, the same again makes what it would have made.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from click.testing import CliRunner

from persona_assets.cli import main
from persona_assets.dagster_databases import DatabaseDamaged, check_databases
from persona_assets.disk import DiskError
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project, make
from persona_assets_tests.reliability.bench import Bench, bench, lost
from persona_assets_tests.reliability.small_disk import (
    PAGE,
    SmallDisk,
    backwards_clock,
    forbidden,
    small_disk,
)
from persona_assets_tests.reliability.table import Row

#: What is made, and how often each on a full disk.
KINDS = {
    "training_dataset": ("a dataset", 20),
    "checkpoint": ("a checkpoint", 8),
    "cell_outcomes": ("a table of outcomes", 8),
    "warehouse": ("the warehouse", 12),
    "report": ("the report", 8),
}
_AGAIN = "the same run again, once there is room"
Fault = Callable[[], AbstractContextManager[None]]


def rows(folder: Path, seed: int) -> list[Row]:
    """All of it, on a tiny study that is made for it."""
    project = Project(folder / "data")
    make(project)
    return tried(project.data, folder / "work", seed)


def tried(
    data: Path,
    folder: Path,
    seed: int,
    kinds: Mapping[str, tuple[str, int]] = KINDS,
    refused: Iterable[str] = tuple(KINDS),
    databases: int = 24,
    clock: bool = True,
) -> list[Row]:
    """Every fault on copies of the complete study in ``data``; works in ``folder``.

    Args:
        kinds: Assets, each with what it is and how often it meets a full disk.
        refused: Assets that meet a store which may not be written.
        databases: How often Dagster's databases meet a full disk.
        clock: Whether a clock runs backwards too.
    """
    rng = random.Random(seed)
    with small_disk(folder / "disk") as disk, small_disk(folder / "dagster") as beside:
        shutil.copytree(data, disk.folder / "data")
        shutil.copytree(data / "dagster", beside.folder / "storage")
        with bench(disk.folder / "data", beside.folder / "storage") as on:
            found = [_full(on, disk, asset, *kind, rng) for asset, kind in kinds.items()]
            found.append(_full_databases(on, beside, databases, rng))
            found.append(_refused_before(on, disk, beside, rng))
            found.append(_read_only(on, disk, refused, rng))
            found.append(_forbidden(on, refused, rng))
    return [*found, _backwards(data, folder / "clock", rng)] if clock else found


def trial(on: Bench, ref: Ref, fault: Fault, *says: str) -> str | None:
    """Let a partition be made under a fault, and again without; what went wrong, in words.

    Args:
        says: What the error must have in it, the path besides. Without, it need not fail.
    """
    content, before = on.content(ref), on.landed()
    on.remove(ref)
    with fault():
        under = on.make(ref)
    problems = []
    if under.status != "failed":
        problems.append("made all the same" if says else "")
    else:
        told = " ".join(under.error.split())
        places = (str(on.store.root), str(on.dagster))
        if not any(place in told for place in places) or "Traceback" in told:
            problems.append(f"no clear error: {told[-600:]}")
        problems += [
            f"it does not say {what!r}: {told[-600:]}" for what in says if what not in told
        ]
    problems.append(on.store.verify(ref))
    problems.append(lost(before, on.landed(), but=[ref]) or "")
    again = on.make(ref)
    if again.status == "failed":
        problems.append(f"not made afterwards: {again.error[-600:]}")
    elif on.content(ref) != content:
        problems.append("made afterwards with another content")
    elif not on.is_recorded(ref):
        problems.append("Dagster has no record of it")
    problems.append(lost(before, on.landed(), but=[ref]) or "")
    problems += [f"left behind: {path}" for path in on.store.folder(ref).glob(".*")]
    try:
        check_databases()
    except (DatabaseDamaged, DiskError) as error:
        problems.append(str(error))
    return "; ".join(f"{ref}: {p}" for p in problems if p) or None


def _some(on: Bench, asset: str, rng: random.Random) -> Ref:
    """A partition of an asset; of checkpoints one that is trained."""
    if on.graph.assets[asset].keys is None:
        return Ref(asset)
    return Ref(asset, rng.choice(on.study.cells_of("trained")).key)


def _full(on: Bench, disk: SmallDisk, asset: str, what: str, times: int, rng: random.Random) -> Row:
    """The store's disk fills up on any page of a partition, its manifest's too."""
    row = Row(f"disk full while {what} is written ({disk.how})", recovered_by=_AGAIN)
    for _ in range(times):
        ref = _some(on, asset, rng)
        manifest = on.store.landed(ref)
        sizes = [*(entry["bytes"] for entry in manifest.files.values()), len(manifest.to_json())]
        pages = rng.randrange(sum(-(-size // PAGE) for size in sizes))
        says = ("No space left on device", "make room") if disk.mounted else ()
        row.count(trial(on, ref, partial(disk.full, PAGE * pages), *says))
    row.seen = "path, bytes free there and remedy in the error"
    return row


def _full_databases(on: Bench, beside: SmallDisk, times: int, rng: random.Random) -> Row:
    """The disk of Dagster's databases fills up, from its opening to a run's last event."""
    row = Row(f"disk full under Dagster's databases ({beside.how})", recovered_by=_AGAIN)
    for _ in range(times):
        fault = partial(beside.full, rng.randrange(700_000))
        row.count(trial(on, _some(on, "training_dataset", rng), fault))
    row.seen = "folder and bytes free there in the error; databases whole each time"
    return row


def _refused_before(on: Bench, disk: SmallDisk, beside: SmallDisk, rng: random.Random) -> Row:
    """``persona-assets run`` on a disk that nothing can be written to says so before any work."""
    row = Row("`run` started on a full, read-only or another's disk", recovered_by=_AGAIN)
    for place in (disk, beside):
        where = on.store.root if place is disk else on.dagster
        faults = {
            "No space left on device": partial(place.full, 0),
            "Read-only file system": place.read_only,
            "Permission denied": partial(forbidden, where),
        }
        if not place.mounted:
            faults = {"Permission denied": faults["Permission denied"]}
        for says, fault in faults.items():
            ref = _some(on, "training_dataset", rng)
            before = on.landed()
            on.remove(ref)
            with fault():
                done = CliRunner().invoke(main, ["run", "--study", "tiny", "--workers", "1"])
            told = " ".join(done.output.split())
            problem = None
            if done.exit_code != 1 or not told.startswith(f"Error: {where}") or says not in told:
                problem = f"{says}: exit code {done.exit_code}, {told[-600:]} {done.exception!r}"
            again = on.make(ref)
            row.count(problem or again.error or lost(before, on.landed(), but=[ref]))
    row.seen = "nothing computed; path and need in one sentence"
    return row


def _read_only(on: Bench, disk: SmallDisk, assets: Iterable[str], rng: random.Random) -> Row:
    """A store that becomes read-only: nothing is made, and all that reads goes on."""
    row = Row("store read-only", recovered_by="the same run again, once it is writable")
    if not disk.mounted:
        row.seen = f"not tried: {disk.how}"
        return row
    for asset in assets:
        says = ("Read-only file system", "Mount its file system for writing")
        row.count(trial(on, _some(on, asset, rng), disk.read_only, *says))
    (cell,) = rng.sample([cell.key for cell in on.study.cells], 1)
    for command in (
        ["status"],
        ["status", "--why", cell],
        ["verify"],
        ["sql", "FROM study"],
        ["trace", "count/cells"],
    ):
        with disk.read_only():
            done = CliRunner().invoke(main, [*command, "--study", "tiny"])
        row.count(f"{command}: {done.output[-600:]}" if done.exit_code else None)
    row.seen = "status, verify, sql and trace work on it"
    return row


def _forbidden(on: Bench, assets: Iterable[str], rng: random.Random) -> Row:
    """Modes forbid to write to the store; root's right to pass over them is dropped."""
    row = Row("no permission to write the store", recovered_by="the same run again, once granted")
    for asset in assets:
        ref = _some(on, asset, rng)
        says = ("Permission denied", "needs the right to write there")
        row.count(trial(on, ref, partial(forbidden, on.store.root), *says))
    row.seen = "path and user in the error"
    return row


def _backwards(data: Path, folder: Path, rng: random.Random) -> Row:
    """A whole ``persona-assets run`` under a clock that runs backwards, from a day in the past."""
    row = Row("clock running backwards, a minute a second", recovered_by="not needed")
    folder.mkdir()
    library = backwards_clock(folder)
    if library is None:
        row.seen = "not tried: no C compiler here"
        return row
    project = Project(data).copy(folder / "data")
    with bench(project.data) as on:
        refs = [_some(on, asset, rng) for asset in ("training_dataset", "warehouse", "report")]
        cell = refs[0].key
        refs += [Ref("checkpoint", cell), Ref("cell_outcomes", cell)]
        before, content = on.landed(), {ref: on.content(ref) for ref in refs}
        on.remove(*refs)
        done = project.run(
            *("run", "--study", "tiny", "--workers", "1"),
            LD_PRELOAD=str(library),
            BACKWARDS_SINCE=str(time.time() - 86_400),
        )
        told = (done.stdout + done.stderr)[-600:]
        after = on.landed()
        for ref in refs:
            problem = None
            if str(ref) not in after:
                problem = f"{ref} was not made: {told}"
            elif after[str(ref)].landed_at >= before[str(ref)].landed_at:
                problem = f"{ref}: the clock did not run backwards"
            elif on.content(ref) != content[ref]:
                problem = f"{ref} was made with another content"
            row.count(problem)
        row.count(lost(before, after, but=refs))
        row.count(None if done.returncode == 0 else told)
        stale = [str(ref) for ref, state in project.states().items() if state != "fresh"]
        row.count(f"not up to date: {stale}" if stale else None)
    row.seen = "everything made, and up to date by the right clock"
    return row
