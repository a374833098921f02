"""A seeded sample of what is done at once, and that what is looked for is noticed."""

from __future__ import annotations

import random
import sys
import time
from types import SimpleNamespace

import duckdb

from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project
from persona_assets_tests.reliability import concurrency
from persona_assets_tests.reliability.concurrency import (
    Reader,
    evaluated_while_read_and_rebuilt,
    made_by_two,
)

DATASET = Ref("training_dataset", "librarian.garbage_cot.42")


def test_the_second_waits_for_the_first_and_keeps_what_it_made(own_project):
    assert made_by_two(own_project, DATASET, first_dies=False) is None


def test_evaluations_beside_a_rebuild_and_a_reader(project, own_project, monkeypatch):
    monkeypatch.setattr(concurrency, "_REBUILDS", 1)
    found, reader = evaluated_while_read_and_rebuilt(own_project, project, random.Random(7), 2)
    assert found == [None] * len(found)
    assert len(found) >= 4  # a rebuild, two evaluations, what was read
    assert reader.n > 2
    ((rows, _, cells, _),) = reader.seen
    assert (rows, cells) == (13 * 11 * 4 * 24, 13)


class Careless(Project):
    """Makes a partition without waiting for its turn."""

    def materialization(self, ref, *, force=False):
        code = (
            "import sys, time; from pathlib import Path;"
            "from persona_assets.store import Provenance, Ref, Store;"
            "store, ref = Store(Path(sys.argv[1]), 'tiny'), Ref(*sys.argv[2:])\n"
            "with store.draft(ref) as draft:\n"
            "    (draft / 'file').touch(); time.sleep(1)\n"
            "    inputs = {'upstream': {}, 'code_version': '1'}\n"
            "    store.land(ref, draft, provenance=Provenance('r', inputs, 'h'))\n"
        )
        return [sys.executable, "-c", code, str(self.data / "store"), ref.asset, ref.key]


def test_two_that_both_make_it_are_noticed(own_project):
    found = made_by_two(Careless(own_project.data), DATASET, first_dies=False)
    assert found == f"{DATASET}: the second did not say that it waits: "


def test_a_reader_notices_other_rows_and_a_warehouse_that_cannot_be_read():
    def warehouse() -> duckdb.DuckDBPyConnection:
        opened.append(time.monotonic())
        db = duckdb.connect()
        if len(opened) < 4:
            db.execute(
                "CREATE TABLE outcomes AS SELECT 'c' AS cell, true AS is_correct, "
                f"'r' AS rationale FROM range({len(opened)})"
            )
        return db

    opened: list[float] = []
    with Reader(SimpleNamespace(warehouse=warehouse)) as reader:
        while reader.problem is None:
            assert len(opened) < 5
            time.sleep(0.05)
    assert {seen[0] for seen in reader.seen} == {1, 2, 3}
    assert "Table with name outcomes does not exist" in reader.problem
