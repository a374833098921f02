"""A Ray cluster of a test's own: a head and further nodes, all of them on loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from persona_assets_tests.scale.postgres import free_port

_PATIENCE = 120.0


class Node:
    """A started node: its processes, which end with it."""

    def __init__(self, environment: Mapping[str, str], folder: Path, *arguments: str):
        program = Path(sys.executable).with_name("ray")
        ports = {
            f"--{name}": str(free_port())
            for name in (
                *("node-manager-port", "object-manager-port", "metrics-export-port"),
                *("dashboard-agent-listen-port", "runtime-env-agent-port"),
            )
        }
        #: Of the node's agent, by which the head knows it.
        self.port = ports["--dashboard-agent-listen-port"]
        self.log = (folder / f"node-{free_port()}.log").open("w+")
        self.process = subprocess.Popen(
            [
                *(str(program), "start", "--block", "--node-ip-address", "127.0.0.1"),
                *("--disable-usage-stats", "--include-log-monitor", "false"),
                *("--object-store-memory", str(80 << 20), "--min-worker-port", "0"),
                *("--max-worker-port", "0"),
                *(part for port in ports.items() for part in port),
                *arguments,
            ],
            env=dict(environment),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def processes(self) -> list[psutil.Process]:
        """Its processes and theirs."""
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(self.process.pid)
            return [started, *started.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL to its raylet and all else of it, jobs too: a machine that is no longer there.

        A raylet alone is not enough: its jobs go on for a while, to their end even.
        """
        for process in sorted(self.processes(), key=lambda process: process.name() != "raylet"):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def stop(self) -> None:
        """End all of it, however it is."""
        left = self.processes()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(left, timeout=5)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(timeout=30)
        self.log.close()


class Cluster:
    """A head, from ``with`` to its end, and what nodes are added to it.

    Args:
        environment: That of each node, and so of the jobs.
        cpus, gpus: What a node says that it has, whatever the machine has.
    """

    def __init__(self, environment: Mapping[str, str], cpus: int = 1, gpus: int = 0):
        # Short, for it holds sockets whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))
        programs = Path(sys.executable).parent  # a job's command is `dagster`
        self.environment = {
            **environment,
            "PATH": f"{programs}{os.pathsep}{environment['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.nodes: list[Node] = []
        self.port, dashboard = free_port(), free_port()
        self.url = f"http://127.0.0.1:{dashboard}"
        self._start(
            *("--head", "--port", str(self.port)),
            *("--num-cpus", str(cpus), "--num-gpus", str(gpus)),
            *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard)),
            *("--ray-client-server-port", str(free_port()), "--temp-dir", str(self.folder)),
        )

    def _start(self, *arguments: str, **variables: str) -> Node:
        self.nodes.append(Node(self.environment | variables, self.folder, *arguments))
        return self.nodes[-1]

    def add(self, cpus: int = 1, gpus: int = 0, **variables: str) -> Node:
        """A further node; ``variables`` are what its environment has otherwise."""
        return self._start(
            *("--address", f"127.0.0.1:{self.port}"),
            *("--num-cpus", str(cpus), "--num-gpus", str(gpus)),
            **variables,
        )

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error) -> None:
        for node in reversed(self.nodes):
            node.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def wait_for(self, nodes: int) -> None:
        """Wait until the head answers for jobs and so many nodes are there."""
        deadline = time.monotonic() + _PATIENCE
        while self._alive() < nodes:
            for node in self.nodes:
                node.log.seek(0)
                assert node.process.poll() is None, node.log.read()
            assert time.monotonic() < deadline, f"{nodes} nodes did not come up"
            time.sleep(0.5)

    def _alive(self) -> int:
        with suppress(OSError):
            for page in ("api/jobs/", "nodes?view=summary"):
                with urllib.request.urlopen(f"{self.url}/{page}", timeout=30) as reply:
                    answer = json.load(reply)
            nodes = answer["data"]["summary"]
            return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)
        return 0

    def at_work(self, node: Node) -> set[str]:
        """The names of the jobs that a node runs."""
        return {
            job["submission_id"]
            for job in self.jobs()
            if job["status"] == "RUNNING"
            and job["driver_agent_http_address"].endswith(f":{node.port}")
        }

    def job(self, name: str) -> dict:
        """What the head knows of a job."""
        (found,) = [job for job in self.jobs() if job["submission_id"] == name]
        return found

    def jobs(self) -> list[dict]:
        """What the head knows of its jobs."""
        with urllib.request.urlopen(f"{self.url}/api/jobs/", timeout=30) as reply:
            return [job for job in json.load(reply) if job["submission_id"]]
