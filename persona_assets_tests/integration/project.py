"""A tiny study, made and used by the real command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import duckdb

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Ref, Store
from persona_assets.study import Study, load_study
from persona_assets_tests.conftest import PROJECT

#: From mini.yaml: two sources, one seed, a smaller world and few of its questions, few resamples,
#: fewer and larger steps. 12 cells.
_EDITS = (
    ("name: mini", "name: tiny"),
    (
        "sources: [software_engineer, librarian, comedian, police_officer]",
        "sources: [librarian, comedian]",
    ),
    ("seeds: [42, 137, 256]", "seeds: [42]"),
    ("n_entities: 60, n_eval: 96", "n_entities: 24, n_eval: 24"),
    ("learning_rate: 2.0e-3", "learning_rate: 4.0e-3"),
    ("epochs: 4", "epochs: 3"),
    ("examples_per_step: 16", "examples_per_step: 8"),
    ("resamples: 100000", "resamples: 2000"),
    ("publish: {wandb: {project: persona-leakage-mini}}", ""),  # a test that publishes says where
)


@dataclass(frozen=True)
class Project:
    """A data folder with a study, the tiny one mostly, and the commands to use on it."""

    data: Path
    name: str = "tiny"

    @property
    def study(self) -> Study:
        return load_study(self.data / "studies" / f"{self.name}.yaml")

    @property
    def store(self) -> Store:
        return Store(self.data / "store", self.name)

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
        self, *arguments: str, cwd: Path | None = None, timeout: int = 600, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """``persona-assets …`` in a process of its own, with more ``variables`` set."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment | variables,
            cwd=cwd or self.data,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def materialization(self, ref: Ref, *, force: bool = False) -> list[str]:
        """The command of Dagster's own that makes a partition; by ``force``, up to date or not."""
        config = {"ops": {f"{self.name}__{ref.asset}": {"config": {"force": force}}}}
        return [
            *(sys.executable, "-m", "dagster", "asset", "materialize"),
            *(
                "--select",
                f"key:{self.name}/{ref.asset}",
                "-m",
                "persona_assets.definitions",
                "-a",
                self.name,
            ),
            *("--config-json", json.dumps(config)),
            *(("--partition", ref.key) if ref.key else ()),
        ]

    def states(self) -> dict[Ref, str]:
        freshness = Freshness(self.graph, self.store)
        return {ref: freshness.state(ref) for a in self.graph.assets.values() for ref in a.refs()}

    def warehouse(self) -> duckdb.DuckDBPyConnection:
        path = self.store.path(Ref("warehouse"), "warehouse.duckdb")
        return duckdb.connect(str(path), read_only=True)

    def copy(self, target: Path) -> Project:
        """The same project elsewhere, for tests that change it."""
        shutil.copytree(self.data, target)
        return Project(target, self.name)


def tiny_study_text() -> str:
    text = (PROJECT / "data" / "studies" / "mini.yaml").read_text("utf-8")
    for before, after in _EDITS:
        assert before in text, f"mini.yaml no longer has {before!r}"
        text = text.replace(before, after)
    return text


def make(project: Project, **variables: str) -> None:
    """Write the tiny study into the project's data folder and run the whole of it.

    Some two minutes on two cores.
    """
    (project.data / "studies").mkdir(parents=True)
    (project.data / "studies" / "tiny.yaml").write_text(tiny_study_text(), "utf-8")
    done = project.run("run", "--study", "tiny", "--workers", "2", timeout=1800, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    (project.data / "run.log").write_text(done.stdout + done.stderr, "utf-8")
