"""Runs as jobs of a Ray cluster, one of whose two nodes is lost in the middle of a backfill."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pytest

from persona_assets import environment
from persona_assets.store import Ref
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project, tiny_study_text
from persona_assets_tests.integration.webserver import Webserver, backfilled, start_backfill
from persona_assets_tests.reliability import whole
from persona_assets_tests.scale import grid
from persona_assets_tests.scale.cluster import Cluster, Node
from persona_assets_tests.scale.grid import CHAIN
from persona_assets_tests.scale.machines import machine, upload

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
        ("max_concurrent_runs: 8", f"max_concurrent_runs: {WORKERS}"),
        ("limit: 6", f"limit: {WORKERS}"),
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


def completed_without(
    node: Node,
    cluster: Cluster,
    server: Webserver,
    project: Project,
    keys: Sequence[str],
) -> str:
    """A backfill of cells, whose id it returns, in the middle of which a node is killed for good.

    When a third has landed, and a cell that the node makes has its training rows, no outcomes yet.
    """

    def is_in_the_middle() -> bool:
        at_work = cluster.at_work(node)
        made = [
            tag["value"]
            for run in backfilled(server, backfill)["runs"]
            for tag in run["tags"]
            if tag["key"] == "dagster/partition" and f"dagster-run-{run['runId']}" in at_work
        ]
        has = project.store.manifest
        return any(
            has(Ref("training_dataset", key)) and not has(Ref("cell_outcomes", key)) for key in made
        )

    backfill = start_backfill(server, CHAIN, keys)
    grid.wait(lambda: grid.landed(project, keys) >= len(keys) * len(CHAIN) // 3, 3600)
    grid.wait(is_in_the_middle, 600)
    node.kill()
    grid.wait(lambda: grid.status(server, backfill) != "REQUESTED", 3600)
    assert grid.status(server, backfill) == "COMPLETED_SUCCESS"
    return backfill


@pytest.mark.heavy
def test_the_grid_over_two_nodes_one_of_which_is_lost(project, postgres, tmp_path):
    ours = mini_grid(project, tmp_path / "data")
    keys = [cell.key for cell in ours.study.cells]
    assert len(keys) == 66
    grid.unmake(ours, keys)
    home = {"DAGSTER_HOME": str(ours.data)}
    with Cluster(ours.environment | home | postgres.variables, cpus=WORKERS // 2) as cluster:
        node = cluster.add(cpus=WORKERS // 2)
        cluster.wait_for(2)
        address = {"PERSONA_ASSETS_RAY": cluster.url}
        with Webserver(ours, smaller(tmp_path / "home"), **postgres.variables, **address) as server:
            backfill = completed_without(node, cluster, server, ours, keys)
            with grid.instance(ours, **postgres.variables, **address) as found:
                assert grid.problems(ours, found, keys) == []
                assert lost_and_made_again(found, backfill) >= 1
            assert grid.others(ours, project, keys) == []
    assert whole.orphans(ours) is None


@pytest.mark.heavy
def test_nodes_that_share_object_storage_and_the_database_alone(
    project, postgres, storage, tmp_path
):
    """Four cells over three nodes, each with a data folder that has the study file in it."""
    keys = grid.trained(project, 4)
    upload(project, storage, but=[Ref(asset, key) for asset in CHAIN for key in keys])
    machines = [machine(tmp_path / name, tiny_study_text(), storage) for name in ("1", "2", "3")]
    head = machines[0]
    home = {"DAGSTER_HOME": str(head.data)}
    names = (environment.DATA, environment.DAGSTER_STORAGE)
    with Cluster(head.environment | home | postgres.variables, cpus=1) as cluster:
        for count, other in enumerate(machines[1:], 2):
            lost = cluster.add(cpus=1, **{name: other.environment[name] for name in names})
            cluster.wait_for(count)  # two that start at a time here take each other's sockets
        address = {"PERSONA_ASSETS_RAY": cluster.url}
        with Webserver(head, smaller(tmp_path / "home"), **postgres.variables, **address) as server:
            backfill = completed_without(lost, cluster, server, head, keys)
            with grid.instance(head, **postgres.variables, **address) as found:
                assert lost_and_made_again(found, backfill) >= 1
            nodes = {job["driver_node_id"] for job in cluster.jobs()}
    assert len(nodes) == 3
    assert grid.others(head, project, keys) == []
    assert {head.states()[Ref(asset, key)] for asset in CHAIN for key in keys} == {"fresh"}
    verified = head.run("verify", "--study", "tiny")
    assert verified.stdout.startswith("0 of "), verified.stdout
    assert [whole.orphans(each) for each in machines] == [None] * 3
