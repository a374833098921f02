"""Dagster's history in Postgres, which is restarted in the middle of a backfill."""

from __future__ import annotations

import time

import pytest

from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.webserver import Webserver, start_backfill
from persona_assets_tests.reliability import whole
from persona_assets_tests.scale import grid
from persona_assets_tests.scale.grid import CHAIN

HOME = PROJECT / "deploy" / "postgres"
WORKERS = 4


@pytest.mark.heavy
def test_twenty_cells_and_a_restart_in_the_middle(project, postgres, tmp_path):
    """Four runs at once; the database is away for five seconds, in which runs begin and end."""
    ours = grid.widened(project, tmp_path / "data", (42, 137, 256))
    keys = grid.trained(ours, 20)
    grid.unmake(ours, keys)
    with Webserver(ours, HOME, **postgres.variables) as server:
        with grid.instance(ours, **postgres.variables) as instance:
            instance.event_log_storage.set_concurrency_slots("cpu_models", WORKERS)
        backfill = start_backfill(server, CHAIN, keys)
        grid.wait(lambda: grid.landed(ours, keys) >= len(keys) * len(CHAIN) // 2, 900)
        assert grid.status(server, backfill) == "REQUESTED", "over before the restart"
        postgres.stop()
        time.sleep(5)
        postgres.start()
        grid.wait(lambda: grid.status(server, backfill) != "REQUESTED", 900)
        assert grid.status(server, backfill) == "COMPLETED_SUCCESS"
        with grid.instance(ours, **postgres.variables) as instance:
            assert grid.problems(ours, instance, keys) == []
        assert grid.others(ours, project, keys) == []
    assert whole.orphans(ours) is None
