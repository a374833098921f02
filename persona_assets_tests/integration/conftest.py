"""A tiny study, run once for all integration tests by the real command line."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pytest

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Ref, Store
from persona_assets.study import Study, load_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.webserver import Webserver

#: Secrets that the environment of the run holds: nothing that it makes or says may hold any.
CANARIES = {
    name: f"canary-{name.lower()}-5e1f0c9a77"
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
}

#: From mini.yaml: two sources, one seed, few questions and resamples. 12 cells.
_EDITS = (
    ("name: mini", "name: tiny"),
    (
        "sources: [software_engineer, librarian, comedian, police_officer]",
        "sources: [librarian, comedian]",
    ),
    ("seeds: [42, 137, 256]", "seeds: [42]"),
    ("n_eval: 96", "n_eval: 24"),
    ("resamples: 100000", "resamples: 2000"),
)


@dataclass(frozen=True)
class Project:
    """A data folder with the tiny study, and the commands to use on it."""

    data: Path

    @property
    def study(self) -> Study:
        return load_study(self.data / "studies" / "tiny.yaml")

    @property
    def store(self) -> Store:
        return Store(self.data / "store", "tiny")

    @property
    def graph(self) -> Graph:
        return Graph(self.study)

    @property
    def environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PERSONA_ASSETS_")}
        return inherited | {
            "DAGSTER_HOME": str(PROJECT),
            "PERSONA_ASSETS_DATA": str(self.data),
            "PERSONA_ASSETS_DAGSTER": str(self.data / "dagster"),
        }

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "persona_assets", *arguments]

    def run(
        self, *arguments: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """``persona-assets …`` in a process of its own, with more ``variables`` set."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment | variables,
            cwd=cwd or self.data,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def states(self) -> dict[Ref, str]:
        freshness = Freshness(self.graph, self.store)
        return {ref: freshness.state(ref) for a in self.graph.assets.values() for ref in a.refs()}

    def warehouse(self) -> duckdb.DuckDBPyConnection:
        path = self.store.path(Ref("warehouse"), "warehouse.duckdb")
        return duckdb.connect(str(path), read_only=True)

    def copy(self, target: Path) -> Project:
        """The same project elsewhere, for tests that change it."""
        shutil.copytree(self.data, target)
        return Project(target)


def tiny_study_text() -> str:
    text = (PROJECT / "data" / "studies" / "mini.yaml").read_text("utf-8")
    for before, after in _EDITS:
        assert before in text, f"mini.yaml no longer has {before!r}"
        text = text.replace(before, after)
    return text


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Project:
    """The tiny study, complete. Tests that change it take a copy.

    Several test processes share one: the first that asks makes it, the others wait.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in it
    project, made = Project(root / "project" / "data"), root / "project" / "made"
    with (root / "project.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(project.data, ignore_errors=True)
            _make(project)
            made.touch()
    return project


def _make(project: Project) -> None:
    (project.data / "studies").mkdir(parents=True)
    (project.data / "studies" / "tiny.yaml").write_text(tiny_study_text(), "utf-8")
    done = project.run("run", "--study", "tiny", "--workers", "2", **CANARIES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    (project.data / "run.log").write_text(done.stdout + done.stderr, "utf-8")


@pytest.fixture
def own_project(project, tmp_path) -> Project:
    """A copy of the complete tiny study that a test may change."""
    return project.copy(tmp_path / "data")


@pytest.fixture
def webserver(own_project):
    """``dagster dev`` on the test's own copy."""
    server = Webserver(own_project)
    try:
        server.wait_until_up()
        yield server
    finally:
        server.stop()
