"""Pools: which asset is in which, how many runs each allows, and who counts."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import dagster as dg
import grpc
import pytest
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.test_utils import create_run_for_test

from persona_assets import environment, gpus
from persona_assets.environment import PROCESS_TAG, WORKER_TAG, process_name
from persona_assets.launcher import LocalRunLauncher
from persona_assets.pools import POOLS, open_pools, pool_of
from persona_assets_tests.conftest import PROJECT


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """A fresh instance of the project's ``dagster.yaml``."""
    monkeypatch.setenv("DAGSTER_HOME", str(PROJECT))
    monkeypatch.setenv(environment.DAGSTER_STORAGE, str(tmp_path))
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    with dg.DagsterInstance.get() as fresh:
        yield fresh


def test_model_work_is_pooled_by_what_the_model_wants(mini, length_matched):
    models = {"checkpoint", "baseline_outcomes", "cell_outcomes"}
    assert {a: pool_of(a, mini) for a in models} == dict.fromkeys(models, "cpu_models")
    assert {a: pool_of(a, length_matched) for a in models} == dict.fromkeys(models, "gpu")
    inputs = ("tokenizer", "question_bank", "base_model")
    assert [pool_of(a, mini) for a in inputs] == [None, None, "cpu_models"]
    assert [pool_of(a, length_matched) for a in inputs] == ["hub"] * 3
    for study in (mini, length_matched):
        assert pool_of("warehouse", study) == pool_of("number_ledger", study) == "warehouse"
        assert pool_of("training_dataset", study) is pool_of("contrast_estimate", study) is None


def test_dagster_knows_each_assets_pool():
    from persona_assets.definitions import length_matched, mini

    pools = set()
    for definitions in (mini, length_matched):
        graph = definitions.get_repository_def().asset_graph
        for key in graph.get_all_asset_keys():
            pools |= graph.get(key).pools
    assert pools == set(POOLS)


def test_models_get_a_run_a_processor_or_gpu_and_all_else_one_at_a_time(instance, monkeypatch):
    processors = len(os.sched_getaffinity(0))
    limits = {"gpu": 1, "cpu_models": processors, "hub": 1, "warehouse": 1, "publish": 1}
    monkeypatch.setenv(gpus.VISIBLE, "")
    assert open_pools(instance) == limits
    monkeypatch.setenv(gpus.VISIBLE, "0,1,2,3")
    assert open_pools(instance) == limits | {"gpu": 4}
    monkeypatch.setenv(gpus.VISIBLE, "0,1")  # what was set for four is not for good
    assert open_pools(instance) == limits | {"gpu": 2}


def test_what_a_server_evaluates_takes_no_gpu_of_its_own(length_matched):
    settings = length_matched.evaluation.model_copy(update={"engine": "vllm_server"})
    served = length_matched.model_copy(update={"evaluation": settings})
    assert pool_of("cell_outcomes", served) is pool_of("baseline_outcomes", served) is None
    assert pool_of("checkpoint", served) == "gpu"


def test_a_limit_set_by_hand_stays(instance):
    storage = instance.event_log_storage
    storage.set_concurrency_slots("cpu_models", 7)
    storage.set_concurrency_slots("gpu", 4)
    assert open_pools(instance) == {
        **dict.fromkeys(POOLS, 1),
        "gpu": 4,
        "cpu_models": 7,
    }
    limits = {pool.name: pool.limit for pool in storage.get_pool_limits()}
    assert limits == {"gpu": 4, "cpu_models": 7}


def status(instance, **tags: str) -> WorkerStatus:
    run = create_run_for_test(instance, "cell", tags=tags, status=dg.DagsterRunStatus.STARTED)
    assert isinstance(instance.run_launcher, LocalRunLauncher)
    return instance.run_launcher.check_run_worker_health(run).status


def test_a_run_whose_process_is_gone_is_told_from_one_at_work(instance, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    nobody = f'{{"host": "localhost", "socket": "{tmp_path / "nobody"}"}}'
    assert status(instance, **{WORKER_TAG: process_name()}) == WorkerStatus.RUNNING
    assert status(instance, **{WORKER_TAG: process_name(ended.pid)}) == WorkerStatus.NOT_FOUND
    assert status(instance, **{GRPC_INFO_TAG: nobody}) == WorkerStatus.NOT_FOUND
    # By hand, with `dagster asset materialize`.
    assert status(instance, **{PROCESS_TAG: process_name()}) == WorkerStatus.RUNNING
    assert status(instance, **{PROCESS_TAG: process_name(ended.pid)}) == WorkerStatus.NOT_FOUND
    assert status(instance) == WorkerStatus.RUNNING
    # On another machine, which shares the database: its processes cannot be seen from here.
    assert status(instance, **{WORKER_TAG: f"{ended.pid}@elsewhere"}) == WorkerStatus.RUNNING
    # Re-executed from the interface, with its parent's tags: they tell of another process.
    for tag in (WORKER_TAG, PROCESS_TAG):
        alive = {tag: process_name(), GRPC_INFO_TAG: nobody}
        assert status(instance, **alive) == WorkerStatus.NOT_FOUND


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, WorkerStatus.RUNNING),
        (grpc.StatusCode.UNAVAILABLE, WorkerStatus.NOT_FOUND),
    ],
)
def test_a_code_server_that_is_slow_to_answer_is_not_taken_for_dead(
    instance, monkeypatch, answer, found
):
    class Unanswered(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return answer

    def ask(*args, **more):
        raise DagsterUserCodeUnreachableError("no answer") from Unanswered()

    client = SimpleNamespace(can_cancel_execution=ask)
    launcher = instance.run_launcher
    monkeypatch.setattr(launcher, "_get_grpc_client_for_termination", lambda run_id: client)
    assert status(instance, **{GRPC_INFO_TAG: "{}"}) == found


def test_workers_of_their_own_wait_for_no_pool_and_are_counted_by_the_queue(instance):
    """As those of ``persona-assets run``: in process, on the same instance."""

    @dg.asset(pool="gpu")
    def trained() -> None: ...

    storage = instance.event_log_storage
    storage.set_concurrency_slots("gpu", 1)
    assert storage.claim_concurrency_slot("gpu", "another-run", "step").is_claimed
    done = dg.materialize([trained], instance=instance)
    assert done.success
    assert instance.get_run_by_id(done.run_id).run_op_concurrency.all_pools == {"gpu"}
