"""A study on object storage: made by several machines, read by any."""

from __future__ import annotations

import signal
import subprocess
import time

import duckdb
import pytest

from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project, tiny_study_text
from persona_assets_tests.reliability.whole import other_rows
from persona_assets_tests.scale.machines import Machine, machine, upload

#: Seconds for anything, on a busy machine.
WAIT = 1800


def test_a_machine_that_has_nothing_makes_the_warehouse_from_object_storage(
    project, storage, tmp_path
):
    upload(project, storage)
    for asset in ("warehouse", "report"):
        storage.delete(f"tiny/{asset}/manifest.json")
    fresh = machine(tmp_path / "fresh", tiny_study_text(), storage)
    shown = fresh.run("status", "--study", "tiny").stdout.splitlines()
    missing = [line.split()[0] for line in shown if "missing" in line]
    assert missing == ["warehouse", "report"]
    assert sum(line.count("✓") for line in shown) == 12 * 3 + 5  # stages of cells, and prior ones
    made = subprocess.run(
        fresh.materialization(Ref("warehouse")),
        env=fresh.environment,
        cwd=fresh.data,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    assert other_rows(fresh, project) is None
    other = machine(tmp_path / "other", tiny_study_text(), storage)
    rows = other.run("sql", "--study", "tiny", "SELECT count(*) AS n FROM outcomes")
    assert rows.stdout.split()[-1] == str(13 * 11 * 4 * 24)


@pytest.mark.heavy
def test_two_machines_make_a_study_and_one_is_killed(project, storage, tmp_path):
    machines = [machine(tmp_path / n, tiny_study_text(), storage) for n in ("one", "two")]
    one, two = machines
    first = ("run", "--study", "tiny", "--up-to", "baseline_outcomes", "--workers", "1")
    inputs = one.run(*first, timeout=WAIT)
    assert inputs.returncode == 0, inputs.stdout + inputs.stderr
    makers = [start(one, "librarian.*"), start(two, "comedian.*")]
    cells = [cell for cell in one.study.cells if cell.source == "comedian"]
    until_landed(two, makers[1], [Ref("cell_outcomes", cell.key) for cell in cells], 2)
    makers[1].send_signal(signal.SIGKILL)
    makers[1].wait(60)
    assert makers[0].wait(WAIT) == 0, (one.data / "run.log").read_text()
    done = one.run("run", "--study", "tiny", "--workers", "2", timeout=WAIT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert other_rows(one, project) is None
    verified = two.run("verify", "--study", "tiny")
    assert verified.stdout.startswith("0 of "), verified.stdout
    with duckdb.connect(two.store.path(Ref("warehouse"), "warehouse.duckdb"), read_only=True) as db:
        twice = db.execute(
            "SELECT cell, persona, scaffold, question_id FROM outcomes "
            "GROUP BY ALL HAVING count(*) > 1"
        ).fetchall()
    assert twice == []


def start(machine: Machine, cells: str) -> subprocess.Popen[bytes]:
    with (machine.data / "run.log").open("w") as log:
        return subprocess.Popen(
            machine.command("run", "--study", "tiny", "--cells", cells, "--workers", "1"),
            env=machine.environment,
            cwd=machine.data,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def until_landed(
    project: Project, maker: subprocess.Popen[bytes], refs: list[Ref], count: int
) -> None:
    """Wait until so many of the partitions, which a process is making, have landed."""
    deadline = time.monotonic() + WAIT
    while sum(project.store.manifest(ref) is not None for ref in refs) < count:
        assert maker.poll() is None, (project.data / "run.log").read_text()
        assert time.monotonic() < deadline, f"{count} of {len(refs)} have not landed in {WAIT} s"
        time.sleep(0.5)
