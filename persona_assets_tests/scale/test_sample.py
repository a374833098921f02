"""A sample: a backfill of a cell as a Ray job on a second node, with Postgres restarted in it."""

from __future__ import annotations

import json
import time
from contextlib import closing

from persona_assets.launcher import RAY_TAG
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.webserver import Webserver, backfilled, start_backfill
from persona_assets_tests.reliability import whole
from persona_assets_tests.scale import grid
from persona_assets_tests.scale.cluster import Cluster
from persona_assets_tests.scale.grid import CHAIN
from persona_assets_tests.scale.postgres import PASSWORD

#: A share of the GPU that the node says that it has.
GPUS = 0.5


def test_a_cell_on_a_second_node_with_the_database_restarted(project, postgres, tmp_path):
    ours = project.copy(tmp_path / "data")
    study = ours.data / "studies" / "tiny.yaml"
    text = study.read_text("utf-8")
    assert "compute: {threads: 1}" in text
    study.write_text(text.replace("compute: {threads: 1}", f"compute: {{gpus: {GPUS}}}"), "utf-8")
    keys = grid.trained(ours, 1)
    grid.unmake(ours, keys)
    home = {"DAGSTER_HOME": str(ours.data)}
    with Cluster(ours.environment | home | postgres.variables, cpus=0) as cluster:
        node = cluster.add(cpus=1, gpus=1)
        address = {"PERSONA_ASSETS_RAY": cluster.url}
        ray = PROJECT / "deploy" / "ray"
        with Webserver(ours, ray, **postgres.variables, **address) as server:
            cluster.wait_for(2)
            backfill = start_backfill(server, CHAIN, keys)
            grid.wait(lambda: grid.landed(ours, keys) > 0, 600)
            (lost,) = backfilled(server, backfill)["runs"]
            postgres.cut_off(lost["runId"])
            time.sleep(2)
            postgres.start()
            grid.wait(lambda: grid.status(server, backfill) != "REQUESTED", 600)
            state = backfilled(server, backfill)
            names = [f"dagster-run-{run['runId']}" for run in state["runs"]]
            grid.wait(lambda: not cluster.at_work(node), 120)
            jobs = [cluster.job(name) for name in names]
        assert state["status"] == "COMPLETED_SUCCESS", state
        with grid.instance(ours, **postgres.variables, **address) as found:
            assert grid.problems(ours, found, keys) == []
    assert grid.others(ours, project, keys) == []
    assert whole.orphans(ours) is None
    assert {name: job["status"] for name, job in zip(names, jobs)} == {
        f"dagster-run-{lost['runId']}": "FAILED",
        names[0]: "SUCCEEDED",
    }
    for job, run in zip(jobs, state["runs"]):
        assert job["driver_agent_http_address"].endswith(f":{node.port}")
        tags = {tag["key"]: tag["value"] for tag in run["tags"]}
        assert json.loads(tags[RAY_TAG]) == {"num_cpus": 1, "num_gpus": GPUS}
    told = json.dumps(jobs) + (ours.data / "dagster-dev.log").read_text("utf-8")
    assert PASSWORD not in told


def test_what_postgres_refuses_is_told_before_any_work(project, postgres, tmp_path):
    """Away, another password, a user that may make no tables: said with the address."""
    ours = project.copy(tmp_path / "data")
    home = {"DAGSTER_HOME": str(PROJECT / "deploy" / "postgres")}

    def said(**variables: str) -> str:
        done = ours.run("run", "--study", "tiny", **home, **postgres.variables | variables)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert PASSWORD not in done.stderr
        return done.stderr

    assert "reads what the environment does not say: set PGHOST" in said(PGHOST="")
    where = f"Dagster's Postgres database postgres at 127.0.0.1:{postgres.port} cannot be used"
    assert where in (wrong := said(PGPASSWORD="another"))
    assert "password authentication failed" in wrong
    with closing(postgres.connect()) as db, db, db.cursor() as cursor:
        cursor.execute("CREATE ROLE guest LOGIN PASSWORD 'guest'")
    assert "its user may make no tables there" in said(PGUSER="guest", PGPASSWORD="guest")
    postgres.stop()
    assert where in (away := said())
    assert "refused" in away
    postgres.start()
