"""A grown study is a study: up to date, on record, and as large as its cells make it."""

from __future__ import annotations

import os
import sqlite3
from unittest.mock import patch

import dagster as dg
import pytest

from benchmarks import grown, looks, sizing
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.records import unrecorded
from persona_assets.store import Ref, Store
from persona_assets.study import load_study


@pytest.fixture(scope="module")
def laid(project, tmp_path_factory):
    """Two studies of 22 and 44 cells, copied from the tiny one: where each is."""
    folders = {}
    for cells in (22, 44):
        folders[cells] = tmp_path_factory.mktemp("grown") / str(cells)
        with patch.dict(os.environ, sizing.surroundings(folders[cells])):
            sizing.lay(project.data, folders[cells], None, cells)
    return folders


@pytest.fixture
def at_44(laid, monkeypatch):
    """The larger one, in the environment: its store and study."""
    for name, value in sizing.surroundings(laid[44]).items():
        monkeypatch.setenv(name, value)
    study = load_study(laid[44] / "studies" / "tiny.yaml")
    return study, Store(laid[44] / "store", "tiny")


def test_all_of_it_is_up_to_date_and_on_record(at_44):
    study, store = at_44
    graph = Graph(study)
    freshness = Freshness(graph, store)
    assert len(study.cells) == 44
    assert {freshness.state(ref) for ref in graph.refs} == {"fresh"}
    with dg.DagsterInstance.get() as instance:
        assert unrecorded(freshness, instance, graph.refs) == frozenset()


def test_a_cell_leaves_the_rows_and_files_that_a_real_one_left(project, laid):
    model = grown.Model(project.data, "tiny")
    cells = load_study(laid[22] / "studies" / "tiny.yaml").cells
    made = [("cell", cell.key) for cell in cells]
    made += [("prior_checkpoints", cell.key) for cell in cells if cell.origin == "carry_over"]
    with sqlite3.connect(model.history / "runs" / "index.db") as db:
        left = 0
        for job, key in made:
            (run_id,) = model.runs(job, model.key(key))
            query = "SELECT count(*) FROM event_logs WHERE run_id = ?"
            left += db.execute(query, (run_id,)).fetchone()[0]
    small, large = (sizing.in_sqlite(laid[n] / "dagster" / "history") for n in (22, 44))
    assert large["rows of event_logs"] - small["rows of event_logs"] == left > 60 * 22
    assert large["rows of runs"] - small["rows of runs"] == len(made)
    files = {n: sizing.of_store(laid[n] / "store")["files of the store"] for n in laid}
    real = [len(model.manifest(Ref("checkpoint", cell.key)).files) for cell in cells]
    assert files[44] - files[22] > sum(real)


@pytest.mark.usefixtures("at_44")
def test_its_sensors_and_pages_know_it():
    assert looks.ask_partitions().keys() == {"query", "first page", "next page"}
    assert looks.tick_sensors().keys() == {"make_aggregates", "keep_so_far"}
    assert looks.build_definitions()["MB described"] > 0.1
