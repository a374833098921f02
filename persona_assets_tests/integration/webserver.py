"""``persona-assets ui``, webserver and daemon, for tests that live what its users live."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project

#: Seconds between looks at a run: each costs the webserver some of the processor that the run has.
_POLL = 1.5


class Webserver:
    """``persona-assets ui`` on a free port, with a DAGSTER_HOME of its own in the data folder.

    It starts at once; ``with`` waits until it is up, and ends it.

    Args:
        home: The folder of the ``dagster.yaml`` that is copied there.
        variables: More of the environment.
    """

    def __init__(self, project: Project, home: Path = PROJECT, **variables: str):
        self.study = project.name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        shutil.copy(home / "dagster.yaml", project.data)
        (project.data / "workspace.yaml").write_text(
            "load_from:\n  - python_module: {module_name: persona_assets.definitions, "
            f"attribute: {project.name}, location_name: {project.name}}}\n"
        )
        self.log = (project.data / "dagster-dev.log").open("w")
        self.process = subprocess.Popen(
            project.command("ui", "--port", str(self.port)),
            env=project.environment | {"DAGSTER_HOME": str(project.data)} | variables,
            cwd=project.data,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Webserver:
        try:
            self.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    def ask(self, query: str, **variables) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": query, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer = json.load(reply)
        assert "errors" not in answer, answer
        return answer["data"]

    def wait_until_up(self, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.ask("{ version }")
                return
            except OSError:
                assert self.process.poll() is None, "dagster dev has ended"
                assert time.monotonic() < deadline, "dagster dev did not come up"
                time.sleep(0.5)

    def listening(self) -> dict[tuple[str, int], str]:
        """What its processes listen on: address and port → the command of who does."""
        started = psutil.Process(self.process.pid)
        found = {}
        for process in (started, *started.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # a run that has ended meanwhile
                for end in process.net_connections("inet"):
                    if end.status == psutil.CONN_LISTEN or end.type == socket.SOCK_DGRAM:
                        found[end.laddr.ip, end.laddr.port] = " ".join(process.cmdline())
        return found

    def stop(self) -> None:
        with suppress(ProcessLookupError):  # it has ended: what waits for it says so
            os.killpg(self.process.pid, signal.SIGINT)
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()


LAUNCH = """
mutation($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
  }
}"""

RUN = """
query($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }
"""


def launch(
    webserver: Webserver, job: str, key: str | None, *assets: str, config: dict | None = None
) -> tuple[str, str]:
    """What the UI's button sends; waits for the run, which goes through the queue."""
    selector = {
        "repositoryLocationName": "tiny",
        "repositoryName": "__repository__",
        "pipelineName": job,
    }
    if assets:
        selector["assetSelection"] = [{"path": ["tiny", asset]} for asset in assets]
    tags = [{"key": "dagster/partition", "value": key}] if key else []
    launched = webserver.ask(
        LAUNCH,
        params={
            "selector": selector,
            "mode": "default",
            "executionMetadata": {"tags": tags},
            "runConfigData": config or {},
        },
    )["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    run_id = launched["run"]["runId"]
    deadline = time.monotonic() + 400
    status = ""
    while status not in ("SUCCESS", "FAILURE", "CANCELED"):
        assert time.monotonic() < deadline, f"run {run_id} is still {status}"
        time.sleep(_POLL)
        status = webserver.ask(RUN, id=run_id)["runOrError"]["status"]
    return run_id, status


BACKFILL = """
mutation($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on LaunchBackfillSuccess { backfillId }
    ... on PythonError { message }
  }
}"""

BACKFILLED = """
query($id: String!) { partitionBackfillOrError(backfillId: $id) {
  ... on PartitionBackfill { status runs(limit: 1000) { runId status tags { key value } } }
} }
"""


def start_backfill(webserver: Webserver, assets: Sequence[str], keys: Sequence[str], **more) -> str:
    """What the UI's button sends for a range; the backfill's id."""
    selection = [{"path": [webserver.study, asset]} for asset in assets]
    launched = webserver.ask(
        BACKFILL, params={"assetSelection": selection, "partitionNames": list(keys), **more}
    )["launchPartitionBackfill"]
    assert launched["__typename"] == "LaunchBackfillSuccess", launched
    return launched["backfillId"]


def backfilled(webserver: Webserver, backfill_id: str) -> dict:
    """How a backfill stands: its status, and its runs with id, status and tags."""
    return webserver.ask(BACKFILLED, id=backfill_id)["partitionBackfillOrError"]


def backfill(
    webserver: Webserver, assets: Sequence[str], keys: Sequence[str], seconds: float = 300, **more
) -> dict[str, tuple[str, str]]:
    """What the UI's button sends for a range; waits for it; (run id, status) by partition."""
    backfill_id = start_backfill(webserver, assets, keys, **more)
    deadline = time.monotonic() + seconds
    while not (state := backfilled(webserver, backfill_id))["status"].startswith("COMPLETED"):
        assert time.monotonic() < deadline, state
        time.sleep(_POLL)
    return {
        tag["value"]: (run["runId"], run["status"])
        for run in state["runs"]
        for tag in run["tags"]
        if tag["key"] == "dagster/partition"
    }
