"""The long run in small: webserver, daemon and browser; and that what is slow or grows shows."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Ref
from persona_assets.study import parse_study
from persona_assets_tests.integration.browser import CHROMEDRIVER, CHROMIUM
from persona_assets_tests.integration.webserver import Webserver
from persona_assets_tests.reliability import longrun
from persona_assets_tests.reliability.longrun import CHAIN
from persona_assets_tests.reliability.memory import SERVICES, Memory, growth

CELL = "librarian.garbage_cot.42"


def test_the_study_has_500_cells():
    study, other = (parse_study(longrun.study_text(seed)) for seed in (7, 8))
    assert len(study.cells) == 500
    assert study.seeds != other.seeds
    assert parse_study(longrun.study_text(7)) == study


@pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER),
    reason="needs Debian's packages chromium and chromium-driver on the PATH",
)
def test_a_cell_of_the_daemon_its_pages_and_the_memory(own_project, tmp_path, monkeypatch):
    monkeypatch.setattr(longrun, "LOOKS", 1)
    monkeypatch.setattr(longrun, "PAGE_SECONDS", 60)  # how busy the machine is, is no matter here
    (own_project.store.folder(Ref("training_dataset", CELL)) / "manifest.json").unlink()
    with Webserver(own_project) as server, Memory(server.process.pid, every=0.5) as memory:
        made = longrun.backfilled(own_project, server, [CELL])
        seen = longrun.pages(own_project, server.port, tmp_path / "profile", random.Random(7))
    assert [(row.tried, row.lost, row.faults) for row in (made, *seen)] == [(1, 0, [])] * 3
    services = {service for _, sizes in memory.samples for service in sizes}
    assert services == set(SERVICES.values())
    assert all(30 < mib < 1500 for _, sizes in memory.samples for mib in sizes.values())
    assert all(row.tried == 1 and "MiB an hour" in row.seen for row in memory.rows("here"))


def test_a_cell_that_did_not_land_is_noticed(own_project, monkeypatch):
    other = "comedian.garbage_cot.42"
    (own_project.store.folder(Ref("checkpoint", CELL)) / "manifest.json").unlink()
    runs = {CELL: ("1", "SUCCESS"), other: ("2", "FAILURE")}
    monkeypatch.setattr(longrun, "backfill", lambda *args, **kwargs: runs)
    row = longrun.backfilled(own_project, None, [CELL, other])
    assert (row.tried, row.lost) == (2, 2)
    assert row.faults[0].startswith(f"{CELL} is ")
    assert row.faults[1] == f"{other} is fresh, run 2 FAILURE"


def test_copies_are_up_to_date_and_those_of_their_cell(own_project):
    path = own_project.data / "studies" / "tiny.yaml"
    path.write_text(path.read_text("utf-8").replace("seeds: [42]", "seeds: [42, 137]"), "utf-8")
    graph, store, key = Graph(own_project.study), own_project.store, "librarian.garbage_cot.137"
    for asset in CHAIN:
        assert longrun.copied(graph, store, Ref(asset, key), 42).ref == Ref(asset, key)
        assert Freshness(graph, store).state(Ref(asset, key)) == "fresh"
    outcomes = [store.frame(Ref("cell_outcomes", k)) for k in (key, CELL)]
    assert [frame["cell"].unique().to_list() for frame in outcomes] == [[key], [CELL]]
    assert [frame["seed"].unique().to_list() for frame in outcomes] == [[137], [42]]
    assert outcomes[0].drop("cell", "seed").equals(outcomes[1].drop("cell", "seed"))
    adapters = [store.landed(Ref("checkpoint", k)) for k in (key, CELL)]
    assert adapters[0].files == adapters[1].files
    assert adapters[0].data_version == adapters[1].data_version


def test_status_is_timed_and_read(own_project, monkeypatch):
    monkeypatch.setattr(longrun, "LOOKS", 1)
    monkeypatch.setattr(longrun, "STATUS_SECONDS", 60)
    assert (longrun.status(own_project).tried, longrun.status(own_project).lost) == (1, 0)
    monkeypatch.setattr(longrun, "STATUS_SECONDS", 0.01)
    assert longrun.status(own_project).faults[0].startswith("took ")
    (own_project.store.folder(Ref("cell_outcomes", CELL)) / "manifest.json").unlink()
    assert "11 fresh" in longrun.status(own_project).faults[0]


def test_what_is_slow_or_wrong_is_noticed(monkeypatch):
    monkeypatch.setattr(longrun, "LOOKS", 3)
    waits = iter([0.0, 0.3, 0.0])

    def prepare():
        time.sleep(0.2)  # is not timed
        seconds = next(waits)
        return lambda: time.sleep(seconds)

    row = longrun.timed("it", 0.15, prepare)
    assert (row.tried, row.lost, row.faults) == (3, 1, ["took 0.3 s"])
    row = longrun.timed("it", 1, lambda: lambda: "wrong")
    assert (row.lost, row.faults) == (3, ["wrong"] * 3)


def test_memory_that_grows_is_noticed():
    minutes = range(90)
    steady = growth("it", [(60 * t, 200 + 50 * min(t, 20) / 20 + t % 2) for t in minutes])
    assert (steady.tried, steady.lost) == (1, 0)
    assert steady.seen.startswith("200 MiB at first, 25")
    leak = growth("it", [(60 * t, 200.0 + 8 * t) for t in minutes])
    assert leak.faults == ["556 MiB in the middle third, 796 in the last"]
    assert "+480 MiB an hour over the last two thirds of 89 min" in leak.seen
    assert growth("it", [(60 * t, 1100.0) for t in minutes]).lost == 1
    assert growth("it", []).faults == ["only 0 samples of it"]


def test_memory_is_that_of_the_whole_tree():
    """A process that starts one which fills 8 MiB every 50 ms, and calls itself the daemon."""
    leak = "import time; kept = []\nwhile True: kept.append(b'x' * 2**23); time.sleep(0.05)"
    command = [sys.executable, "-c", leak, "dagster._daemon"]
    start = f"import subprocess; subprocess.run({command!r})"
    process = subprocess.Popen([sys.executable, "-c", start], start_new_session=True)
    try:
        with Memory(process.pid, every=0.1) as memory:
            time.sleep(3)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    webserver, daemon, *_ = memory.rows("here")
    assert daemon.lost == 1, daemon.seen
    assert webserver.faults == ["only 0 samples of it"]
