"""A code location over a store that is landed by fiat, and the daemon's part played by hand."""

from __future__ import annotations

import shutil

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, DagsterEventType
from dagster._core.test_utils import create_run_for_test

from persona_assets import environment
from persona_assets.asset_table import JOBS
from persona_assets.automation import MAKES
from persona_assets.definitions import study_definitions
from persona_assets.store import Ref
from persona_assets_tests.fabricated import Fabricated
from persona_assets_tests.integration.project import tiny_study_text

AGGREGATES = tuple(Ref(asset) for asset in JOBS["aggregates"].assets)


def is_aggregate(ref: Ref) -> bool:
    return ref.asset == "contrast_estimate" or ref in AGGREGATES


@pytest.fixture(scope="module")
def cells_landed(tmp_path_factory) -> Fabricated:
    """Everything has landed but contrasts and aggregates; tests take a copy."""
    data = tmp_path_factory.mktemp("cells") / "data"
    (data / "studies").mkdir(parents=True)
    (data / "studies" / "tiny.yaml").write_text(tiny_study_text(), "utf-8")
    made = Fabricated(data)
    made.land_all(lambda ref: not is_aggregate(ref))
    return made


class Ticks:
    """A code location, an instance, and the daemon's part: it makes runs of what is requested."""

    def __init__(self, project: Fabricated, instance: dg.DagsterInstance):
        self.project, self.instance = project, instance
        self.definitions = study_definitions(project.graph.study)

    def tick(self, sensor: str = "make_aggregates") -> list[dg.RunRequest]:
        """What one tick requests."""
        repository = self.definitions.get_repository_def()
        context = dg.build_sensor_context(
            self.instance, repository_def=repository, sensor_name=sensor
        )
        done = repository.get_sensor_def(sensor).evaluate_tick(context)
        self.reason = done.skip_message or ""
        return list(done.run_requests)

    def start(self, request: dg.RunRequest, status=dg.DagsterRunStatus.STARTED) -> dg.DagsterRun:
        """A run of a request, which has landed nothing yet; refused for a key that had one."""
        key = {"dagster/run_key": request.run_key}
        assert not self.instance.get_runs(dg.RunsFilter(tags=key)), "the daemon would skip it"
        return self.run(request.job_name, request.asset_selection, status, request.tags | key)

    def run(self, job: str, selection, status=dg.DagsterRunStatus.STARTED, tags=None, **more):
        return create_run_for_test(
            self.instance,
            job_name=job,
            asset_selection=frozenset(selection) if selection else None,
            status=status,
            tags={"study": "tiny", **(tags or {})},
            **more,
        )

    def succeed(self, run: dg.DagsterRun) -> None:
        """The run lands its partitions and ends."""
        partition = run.tags.get("dagster/partition")
        for key in self.project.graph.assets:
            if dg.AssetKey(["tiny", key]) in run.asset_selection:
                self.project.land(Ref(key, partition), run_id=run.run_id)
        self.end(run, DagsterEventType.RUN_SUCCESS)

    def end(self, run: dg.DagsterRun, how=DagsterEventType.RUN_FAILURE) -> None:
        self.instance.report_dagster_event(
            DagsterEvent(event_type_value=how.value, job_name=run.job_name), run.run_id
        )

    def settle(self) -> list[set[str]]:
        """Tick and let every run succeed until nothing is requested; what each tick asked for."""
        asked = []
        while requests := self.tick():
            asked.append({request.tags[MAKES] for request in requests})
            for run in [self.start(request) for request in requests]:
                self.succeed(run)
        return asked


@pytest.fixture
def project(cells_landed, tmp_path, monkeypatch) -> Fabricated:
    data = tmp_path / "data"
    shutil.copytree(cells_landed.data, data)
    monkeypatch.setenv(environment.DATA, str(data))
    return Fabricated(data)


@pytest.fixture
def ticks(project):
    with dg.DagsterInstance.ephemeral() as instance:
        yield Ticks(project, instance)
