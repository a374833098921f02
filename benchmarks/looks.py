"""What looks at a whole study, one thing a process: the processor's seconds of each, as JSON.

    python -m benchmarks.looks definitions|tick|partitions|interface

The study is that of the environment (PERSONA_ASSETS_DATA, DAGSTER_HOME); see sizing.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import dagster as dg
import psutil
from dagster._core.remote_representation.external_data import RepositorySnap
from dagster._core.storage.partition_status_cache import get_and_update_asset_status_cache_value
from dagster._serdes import serialize_value

from persona_assets import definitions
from persona_assets.graph import Graph
from persona_assets.partitions import partitions_definition
from persona_assets.study import load_study

#: The name of the finished study, and of those grown from it.
STUDY = "tiny"


def clocked(do: Callable[[], Any]) -> tuple[Any, float]:
    """What something returns, and the processor's seconds that it took."""
    began = time.process_time()
    result = do()
    return result, round(time.process_time() - began, 3)


def build_definitions() -> dict[str, Any]:
    """The study's code location, and what it sends to the web interface."""
    study = load_study(Path(os.environ["PERSONA_ASSETS_DATA"], "studies", f"{STUDY}.yaml"))
    built, seconds = clocked(lambda: definitions.study_definitions(study).get_repository_def())
    sent, serialized = clocked(lambda: serialize_value(RepositorySnap.from_def(built)))
    return {"to build": seconds, "to describe": serialized, "MB described": _megabytes(sent)}


def tick_sensors() -> dict[str, Any]:
    """A tick of each sensor of the study."""
    located = getattr(definitions, STUDY)
    found = {}
    with dg.DagsterInstance.get() as instance:
        for sensor in located.sensors:
            with dg.build_sensor_context(instance) as context:
                found[sensor.name] = clocked(lambda s=sensor, c=context: s(c))[1]
    return found


def ask_partitions() -> dict[str, Any]:
    """Which partitions of an asset are materialized: by query, and as the interface keeps it."""
    study = load_study(Path(os.environ["PERSONA_ASSETS_DATA"], "studies", f"{STUDY}.yaml"))
    asset, key = Graph(study).assets["cell_outcomes"], dg.AssetKey([STUDY, "cell_outcomes"])
    with dg.DagsterInstance.get() as instance:
        done, query = clocked(lambda: instance.get_materialized_partitions(key))
        assert len(done) == len(study.cells), f"{len(done)} of {len(study.cells)} are recorded"
        page = partial(
            get_and_update_asset_status_cache_value, instance, key, partitions_definition(asset)
        )
        first, again = clocked(page)[1], clocked(page)[1]
    return {"query": query, "first page": first, "next page": again}


_HEALTH = """
query($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      partitionKeysByDimension { name partitionKeys }
      assetPartitionStatuses {
        ... on DefaultPartitionStatuses { materializedPartitions unmaterializedPartitions }
      }
    }
  }
}"""


def ask_interface() -> dict[str, Any]:
    """What a page of an asset's partitions asks of Dagster's webserver, without the browser."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ("-h", "127.0.0.1", "-p", str(port), "-m", "persona_assets.definitions", "-a", STUDY)
    server = psutil.Popen(
        [sys.executable, "-m", "dagster_webserver", *place],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def ask(query: str, **variables: Any) -> bytes:
        body = json.dumps({"query": query, "variables": variables}).encode()
        kind = {"Content-Type": "application/json"}
        address = f"http://127.0.0.1:{port}/graphql"
        with urlopen(Request(address, body, kind), timeout=600) as reply:
            return reply.read()

    def used() -> tuple[float, int]:
        times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
        memory = [process.memory_info().rss for process in (server, *server.children(True))]
        return sum(t.user + t.system for t in times), round(sum(memory) / 2**20)

    try:
        while True:
            try:
                ask("{ version }")
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError("dagster-webserver has ended") from None
                time.sleep(0.2)
        found = {"to start": used()[0]}
        for name in ("first answer", "next answer"):
            before = used()[0]
            answer = ask(_HEALTH, key={"path": [STUDY, "cell_outcomes"]})
            found[name] = round(used()[0] - before, 2)
        node = json.loads(answer)["data"]["assetNodeOrError"]
        statuses = node["assetPartitionStatuses"]
        assert len(statuses["materializedPartitions"]) == len(
            node["partitionKeysByDimension"][0]["partitionKeys"]
        ), "the interface does not know what has landed"
        return found | {"MB answered": _megabytes(answer.decode()), "servers' MiB": used()[1]}
    finally:
        for process in (*server.children(recursive=True), server):
            process.terminate()
        server.wait(60)


def _megabytes(text: str) -> float:
    return round(len(text.encode()) / 1e6, 2)


LOOKS: dict[str, Callable[[], dict[str, Any]]] = {
    "definitions": build_definitions,
    "tick": tick_sensors,
    "partitions": ask_partitions,
    "interface": ask_interface,
}

if __name__ == "__main__":
    print(json.dumps(LOOKS[sys.argv[1]]()))
