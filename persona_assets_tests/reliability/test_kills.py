"""A seeded sample of the kills, and that what is looked for is noticed."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import duckdb
import pytest

from persona_assets.store import Ref
from persona_assets_tests.reliability import kills, whole
from persona_assets_tests.reliability.kills import Bench, Trial, killed_at

CELL = "librarian.garbage_cot.42"
OUTCOMES, CHECKPOINT = Ref("cell_outcomes", CELL), Ref("checkpoint", CELL)


def test_killed_and_run_again_nothing_is_lost(project, tmp_path):
    """The worker that trains, then its successor along with the command."""
    bench = Bench(project.copy(tmp_path / "data"), project, {"checkpoint": 2.0})
    found = killed_at(bench, "checkpoint", "run", random.Random(7))
    assert found == [None] * len(found)
    assert bench.moments["checkpoint"]
    said = (bench.project.data / "kills.log").read_text("utf-8")
    assert "its worker died (exit code -9); it is tried once more" in said


def test_at_least_sixty_kills_are_tried():
    commands = len(kills.KINDS) * (kills._RUNS + kills._MATERIALIZATIONS)
    assert commands == 40
    assert len(kills.KINDS) * (2 * kills._RUNS + kills._MATERIALIZATIONS) == 70


def half_written(project) -> None:
    path = project.store.path(OUTCOMES, "outcomes.parquet")
    path.write_bytes(path.read_bytes()[:-1])


def other_bytes(project) -> None:
    path = project.store.path(OUTCOMES, "outcomes.parquet")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def file_lost(project) -> None:
    project.store.path(OUTCOMES, "outcomes.parquet").unlink()


def manifest_cut_off(project) -> None:
    path = project.store.folder(OUTCOMES) / "manifest.json"
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (half_written, f"outcomes.parquet of {OUTCOMES} is not what its manifest says"),
        (other_bytes, f"outcomes.parquet of {OUTCOMES} is not what its manifest says"),
        (file_lost, f"{OUTCOMES} has landed without outcomes.parquet"),
        (manifest_cut_off, "manifest.json is damaged"),
    ],
)
def test_a_partition_that_is_not_whole_is_noticed(own_project, fault, says):
    before = whole.landed_files(own_project)
    assert whole.broken(own_project) is None
    assert whole.changed(before, whole.landed_files(own_project)) is None
    fault(own_project)
    assert says in whole.broken(own_project)
    assert whole.changed(before, whole.landed_files(own_project)).endswith((" other", " gone"))
    but = whole.landed_files(own_project, [OUTCOMES])
    assert but == {k: v for k, v in before.items() if f"cell_outcomes/{CELL}/" not in k}


def test_what_came_out_otherwise_and_what_was_left_is_noticed(own_project):
    """A manifest of another run is a changed file; a draft is debris, no file of a partition."""
    before = whole.landed_files(own_project)
    path = own_project.store.folder(CHECKPOINT) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"landed_at": "2020-01-01"}))
    found = whole.changed(before, whole.landed_files(own_project))
    assert found == f"checkpoint/{CELL}/manifest.json is other"
    assert whole.debris(own_project) is None
    draft = path.parent / ".draft-0"
    draft.mkdir()
    (draft / "weights").write_bytes(b"half")
    assert whole.debris(own_project) == f"{draft} was left behind"
    assert whole.changed(before, whole.landed_files(own_project)) == found


def altered(project, change: str) -> None:
    """Land a warehouse that was altered by a statement."""
    ref, store = Ref("warehouse"), project.store
    with store.turn(ref), store.draft(ref) as draft:
        path = shutil.copy(store.path(ref, "warehouse.duckdb"), draft)
        with duckdb.connect(str(path)) as db:
            db.execute(change)
        store.land(ref, draft, provenance=store.landed(ref).provenance)


def test_other_rows_of_a_warehouse_are_noticed(project, own_project):
    """And what tells of the run alone is not."""
    for change in (
        "UPDATE outcomes SET run_id = 'other'",
        "UPDATE cells SET outcomes_seconds = 7, checkpoint_run_id = 'other'",
        "UPDATE numbers SET value = 7 WHERE number_id LIKE 'seconds/%'",
    ):
        altered(own_project, change)
        assert whole.other_rows(own_project, project) is None
    for change, found in (
        ("INSERT INTO outcomes FROM outcomes LIMIT 3", "3 rows of outcomes are in ours only"),
        ("UPDATE numbers SET value = 7 WHERE number_id = 'count/cells'", "1 rows of numbers"),
        ("DELETE FROM checks WHERE asset = 'base_model'", "2 rows of checks are in theirs only"),
        ("CREATE TABLE further (x INT)", "the warehouses have other tables or columns"),
    ):
        altered(own_project, change)
        assert whole.other_rows(own_project, project).startswith(found), change


def test_a_process_that_is_left_is_noticed(own_project, monkeypatch):
    monkeypatch.setattr(whole, "_NOTICES", 0.2)
    assert whole.orphans(own_project) is None
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command, env=own_project.environment) as left:
        assert whole.processes(own_project) == [left.pid]
        assert "time.sleep(60)" in whole.orphans(own_project)
        left.kill()
    assert whole.orphans(own_project) is None


def test_a_trial_looks_at_everything_but_what_it_kills(own_project):
    """What a kill does to another partition, and what a plain run does not mend, counts as lost."""
    bench = Bench(own_project, own_project)
    trial = Trial(bench, bench.victim("cell_outcomes", random.Random(7)), random.Random(7))
    assert own_project.store.manifest(trial.ref) is None
    assert trial._looked_at() is None
    assert str(trial.ref) in trial._unlike()
    manifest = own_project.store.folder(CHECKPOINT) / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text + "\n")
    found = f"{trial.ref}, after a kill: checkpoint/{CELL}/manifest.json is other"
    assert trial._looked_at() == found
