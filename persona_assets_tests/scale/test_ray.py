"""Runs as jobs of a Ray cluster, one of whose two nodes is lost in the middle of a backfill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pytest

from persona_assets.store import Ref
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.webserver import Webserver, backfilled, start_backfill
from persona_assets_tests.reliability import whole
from persona_assets_tests.scale import grid
from persona_assets_tests.scale.cluster import Cluster
from persona_assets_tests.scale.grid import CHAIN
from persona_assets_tests.scale.postgres import Postgres

WORKERS = 4


def mini_grid(project: Project, folder: Path) -> Project:
    """The tiny study with all sources and seeds of the mini study: its 66 cells, none made yet."""
    grown = grid.widened(project, folder, (42, 137, 256))
    path = grown.data / "studies" / "tiny.yaml"
    sources = "sources: [librarian, comedian]"
    text = path.read_text("utf-8")
    assert sources in text
    four = "sources: [software_engineer, librarian, comedian, police_officer]"
    path.write_text(text.replace(sources, four), "utf-8")
    for stage in ("training_dataset", "prior_accuracies"):
        done = grown.run("run", "--study", "tiny", "--up-to", stage, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
    return grown


def smaller(folder: Path) -> Path:
    """``deploy/ray``, for as many runs as two nodes of a test take, and less patience."""
    text = (PROJECT / "deploy" / "ray" / "dagster.yaml").read_text("utf-8")
    for before, after in (
        ("max_concurrent_runs: 64", f"max_concurrent_runs: {WORKERS}"),
        ("limit: 62", f"limit: {WORKERS}"),
        ("start_timeout_seconds: 600", "start_timeout_seconds: 180"),
        ("poll_interval_seconds: 30", "poll_interval_seconds: 10"),
    ):
        assert text.count(before) == 1
        text = text.replace(before, after)
    folder.mkdir()
    (folder / "dagster.yaml").write_text(text, "utf-8")
    return folder


def lost_and_made_again(found: dg.DagsterInstance, backfill: str) -> int:
    """How many runs of a backfill were lost; each is to have a successor that came to its end."""
    runs = found.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill}))
    lost = {run.run_id for run in runs if run.status == dg.DagsterRunStatus.FAILURE}
    assert {run.status for run in runs if run.run_id not in lost} == {dg.DagsterRunStatus.SUCCESS}
    assert lost <= {run.parent_run_id for run in runs}
    return len(lost)


@pytest.mark.heavy
def test_the_grid_over_two_nodes_one_of_which_is_lost(project, postgres, tmp_path):
    ours = mini_grid(project, tmp_path / "data")
    keys = [cell.key for cell in ours.study.cells]
    assert len(keys) == 66
    survives_a_lost_node(ours, project, keys, postgres, tmp_path)


def survives_a_lost_node(
    ours: Project, undisturbed: Project, keys: Sequence[str], postgres: Postgres, folder: Path
) -> None:
    """Two runs a node; the second is killed when a third has landed, and never comes back.

    At a moment when a cell that it makes has its training rows and no outcomes yet.
    """

    def is_in_the_middle() -> bool:
        at_work = cluster.at_work(node)
        made = [
            tag["value"]
            for run in backfilled(server, backfill)["runs"]
            for tag in run["tags"]
            if tag["key"] == "dagster/partition" and f"dagster-run-{run['runId']}" in at_work
        ]
        has = ours.store.manifest
        return any(
            has(Ref("training_dataset", key)) and not has(Ref("cell_outcomes", key)) for key in made
        )

    grid.unmake(ours, keys)
    home = {"DAGSTER_HOME": str(ours.data)}
    with Cluster(ours.environment | home | postgres.variables, cpus=WORKERS // 2) as cluster:
        node = cluster.add(cpus=WORKERS // 2)
        cluster.wait_for(2)
        address = {"PERSONA_ASSETS_RAY": cluster.url}
        server = Webserver(ours, smaller(folder / "home"), **postgres.variables, **address)
        try:
            server.wait_until_up()
            backfill = start_backfill(server, CHAIN, keys)
            grid.wait(lambda: grid.landed(ours, keys) >= len(keys) * len(CHAIN) // 3, 3600)
            grid.wait(is_in_the_middle, 600)
            node.kill()
            grid.wait(lambda: grid.status(server, backfill) != "REQUESTED", 3600)
            assert grid.status(server, backfill) == "COMPLETED_SUCCESS"
            with grid.instance(ours, **postgres.variables, **address) as found:
                assert grid.problems(ours, found, keys) == []
                assert lost_and_made_again(found, backfill) >= 1
            assert grid.others(ours, undisturbed, keys) == []
        finally:
            server.stop()
    assert whole.orphans(ours) is None
