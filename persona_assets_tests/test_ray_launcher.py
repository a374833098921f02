"""The Ray launcher: what a run reserves, and whether it is still there; the files of deploy/."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import dagster as dg
import pytest
import yaml
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import LaunchRunContext, WorkerStatus
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.test_utils import create_run_for_test
from ray.job_submission import JobStatus

from persona_assets import environment, gpus
from persona_assets.environment import WORKER_TAG, process_name
from persona_assets.launcher import RAY_TAG, was_launched
from persona_assets.pools import open_pools, reservation
from persona_assets.ray_launcher import RayLauncher
from persona_assets.study_schema import ComputeSettings
from persona_assets_tests.conftest import PROJECT

DEPLOY = PROJECT / "deploy"


class Head:
    """What answers for a cluster: keeps what is submitted, and says what it is told to."""

    def __init__(self):
        self.submitted: dict[str, dict] = {}
        self.answer: JobStatus | Exception = JobStatus.RUNNING

    def submit_job(self, **job) -> None:
        if isinstance(self.answer, Exception):
            raise self.answer
        self.submitted[job["submission_id"]] = job

    def get_job_status(self, submission_id: str) -> JobStatus:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return SimpleNamespace(message="its node was lost")


@pytest.fixture(autouse=True)
def head(monkeypatch) -> Head:
    head = Head()
    monkeypatch.setattr(RayLauncher, "client", head)
    return head


@pytest.fixture(scope="module")
def instance():
    """An instance with the launcher of ``deploy/ray``; its studies are the project's."""
    settings = yaml.safe_load((DEPLOY / "ray" / "dagster.yaml").read_text("utf-8"))
    used = {name: settings[name] for name in ("run_launcher", "concurrency", "run_queue")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONA_ASSETS_RAY", "http://127.0.0.1:1")
        patch.setenv(environment.DATA, str(PROJECT / "data"))
        with dg.instance_for_test(overrides=used) as shared:
            yield shared


def queued(instance, job: str = "__ASSET_JOB", assets: tuple[str, ...] = (), **tags: str):
    """A run as the queue hands it to the launcher."""
    return create_run_for_test(
        instance,
        job,
        asset_selection={dg.AssetKey(asset.split("/")) for asset in assets} or None,
        tags=tags,
        status=dg.DagsterRunStatus.STARTING,
        job_code_origin=origin(job),
    )


def origin(job: str) -> JobPythonOrigin:
    """Where the code of a run is, as its command says it."""
    code = ModuleCodePointer("persona_assets.definitions", "mini")
    return JobPythonOrigin(job, RepositoryPythonOrigin(sys.executable, code))


def launched(instance, run) -> dict:
    """The Ray job of a run that is launched."""
    instance.run_launcher.launch_run(LaunchRunContext(run, None))
    return instance.run_launcher.client.submitted[f"dagster-run-{run.run_id}"]


def reserved(job: dict) -> tuple[float, float]:
    return job["entrypoint_num_cpus"], job["entrypoint_num_gpus"] or 0


def test_what_needs_a_model_reserves_what_the_study_says(mini, length_matched):
    chain = ("training_dataset", "checkpoint", "cell_outcomes", "cell_diagnostics")
    assert reservation(chain, length_matched) == {"num_cpus": 1, "num_gpus": 1}
    assert reservation(["baseline_outcomes"], length_matched)["num_gpus"] == 1
    for asset in ("rationales", "training_dataset", "report", "question_bank", "so_far"):
        assert reservation([asset], length_matched) == {"num_cpus": 1, "num_gpus": 0}
    compute = mini.compute.model_copy(update={"threads": 3, "gpus": 0.25})
    other = mini.model_copy(update={"compute": compute})
    for asset in ("base_model", "prior_checkpoint", "prior_accuracies", "checkpoint"):
        assert reservation([asset], other) == {"num_cpus": 3, "num_gpus": 0.25}
    assert reservation(["contrast_estimate"], other) == {"num_cpus": 3, "num_gpus": 0}


def test_a_model_that_wants_a_gpu_is_not_left_without_one(length_matched):
    silent = length_matched.model_copy(update={"compute": ComputeSettings()})
    with pytest.raises(ValueError, match=r"compute.gpus is 0, and checkpoint wants a GPU"):
        reservation(["checkpoint"], silent)
    assert reservation(["training_dataset"], silent)["num_gpus"] == 0


@pytest.mark.parametrize(
    ("job", "assets", "gpus"),
    [
        ("cell", (), 1),
        ("baseline", (), 1),
        ("rationales", (), 0),
        ("aggregates", (), 0),
        # Of backfills, sensors and the page of an asset: no job's tags come with them.
        ("__ASSET_JOB", ("length_matched/training_dataset", "length_matched/checkpoint"), 1),
        ("__ASSET_JOB", ("length_matched/training_dataset",), 0),
        ("cell", ("length_matched/cell_diagnostics",), 0),
    ],
)
def test_each_run_gets_it_whoever_asked_for_it(instance, job, assets, gpus):
    run = queued(instance, job, assets, study="length_matched")
    assert reserved(launched(instance, run)) == (1, gpus)
    known = instance.get_run_by_id(run.run_id)
    assert json.loads(known.tags[RAY_TAG]) == {"num_cpus": 1, "num_gpus": gpus}
    assert was_launched(known)


def test_the_study_decides_and_what_else_the_tag_says_stays(instance):
    tag = json.dumps({"num_gpus": 7, "memory": 1 << 30})  # re-executed: as the study was then
    asset = ("length_matched/checkpoint",)
    job = launched(instance, queued(instance, assets=asset, **{RAY_TAG: tag}))
    assert reserved(job) == (1, 1)
    assert job["entrypoint_memory"] == 1 << 30


def test_what_is_of_no_study_here_is_launched_all_the_same(instance):
    assert reserved(launched(instance, queued(instance, assets=("elsewhere/thing",)))) == (None, 0)
    assert reserved(launched(instance, queued(instance, "carry_over_backfill", study="mini"))) == (
        None,
        0,
    )


def test_a_job_holds_no_secret_of_the_launcher(instance, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "canary-5e1f0c9a77")
    job = launched(instance, queued(instance, assets=("mini/checkpoint",)))
    assert "canary" not in json.dumps(job, default=str)
    assert set(job["runtime_env"]["env_vars"]) == {"DAGSTER_RUN_JOB_NAME"}


def test_a_head_that_does_not_answer_leaves_the_run_to_the_queue(instance, head):
    import requests

    head.answer = requests.exceptions.ConnectionError("refused")
    with pytest.raises(
        DagsterUserCodeUnreachableError, match=r"head does not answer at http://127"
    ):
        launched(instance, queued(instance, assets=("mini/checkpoint",)))
    queue = instance.get_concurrency_config().run_queue_config
    assert queue.max_user_code_failure_retries * queue.user_code_failure_retry_delay == 3600


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (JobStatus.PENDING, WorkerStatus.RUNNING),
        (JobStatus.RUNNING, WorkerStatus.RUNNING),
        (JobStatus.FAILED, WorkerStatus.FAILED),
        (JobStatus.SUCCEEDED, WorkerStatus.FAILED),  # without having said that it has ended
        # The head's own trouble, and a head that was started anew, which knows of no job.
        (RuntimeError("Request failed with status code 500: ."), WorkerStatus.RUNNING),
        (RuntimeError("Request failed with status code 404: ."), WorkerStatus.UNKNOWN),
    ],
)
def test_a_job_that_is_gone_is_told_from_one_that_cannot_be_asked_for(
    instance, head, answer, found
):
    tags = {RAY_TAG: "{}"}
    run = create_run_for_test(instance, "cell", tags=tags, status=dg.DagsterRunStatus.STARTED)
    head.answer = answer
    assert instance.run_launcher.check_run_worker_health(run).status == found


def test_a_run_that_is_no_ray_job_is_looked_for_among_processes(instance, head):
    head.answer = RuntimeError("Request failed with status code 404: .")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, found in (
        (process_name(), WorkerStatus.RUNNING),
        (process_name(ended.pid), WorkerStatus.NOT_FOUND),
        (f"{ended.pid}@another-machine", WorkerStatus.RUNNING),
    ):
        run = create_run_for_test(
            instance, "cell", tags={WORKER_TAG: name}, status=dg.DagsterRunStatus.STARTED
        )
        assert instance.run_launcher.check_run_worker_health(run).status == found


def test_pools_of_a_cluster_let_as_many_go_as_the_queue(instance, monkeypatch):
    monkeypatch.setenv(gpus.VISIBLE, "0,1")
    one = dict.fromkeys(("hub", "warehouse", "publish"), 1)
    assert open_pools(instance) == {"gpu": 8, "cpu_models": 8} | one


def test_a_job_leases_nothing_and_has_what_was_reserved(monkeypatch, tmp_path):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setattr(gpus, "_leased", None)
    monkeypatch.setenv(gpus.RAY_JOB, "{}")
    monkeypatch.setenv(gpus.VISIBLE, "3")
    for _ in range(2):  # a share: the other half may be another job's
        assert gpus.lease() == "3"
    monkeypatch.delenv(gpus.VISIBLE)
    assert gpus.lease() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["postgres", "ray"])
def test_what_is_deployed_differs_from_the_local_one_in_what_it_must(name):
    local, deployed = (
        yaml.safe_load((folder / "dagster.yaml").read_text("utf-8"))
        for folder in (PROJECT, DEPLOY / name)
    )
    other = {key for key in local | deployed if local.get(key) != deployed.get(key)}
    expected = {"postgres": {"storage"}}
    more = {"concurrency", "run_queue", "run_launcher", "run_monitoring", "run_retries"}
    assert other == expected.get(name, {"storage"} | more)
    assert deployed["storage"]["postgres"]["postgres_db"]["password"] == {"env": "PGPASSWORD"}
    assert deployed["run_monitoring"].keys() >= local["run_monitoring"].keys()
    assert deployed["run_retries"]["retry_on_asset_or_op_failure"] is True
    ours = (DEPLOY / name / "workspace.yaml").read_text("utf-8")
    assert ours == (PROJECT / "workspace.yaml").read_text("utf-8")
