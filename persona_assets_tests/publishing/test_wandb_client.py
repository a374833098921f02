"""The wandb client in a process of its own: logged offline, then sent to a stand-in for W&B."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from persona_assets.publishing import wandb_client
from persona_assets.publishing.markers import Unpublished
from persona_assets.publishing.wandb_records import Record
from persona_assets.store import Provenance, Ref, Store
from persona_assets.study_schema import WandbProject
from persona_assets_tests.wandb_server import wandb_server

PROJECT = WandbProject(project="leakage")
KEY = "f" * 40
LOG = Ref("checkpoint", "a.b.1")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """One landed file."""
    store = Store(tmp_path_factory.mktemp("store"), "small")
    with store.draft(LOG) as draft:
        (draft / "training_log.json").write_text("[1, 2]")
        store.land(LOG, draft, provenance=Provenance("run", {"upstream": {}}, "study"))
    return store


def record(**changed) -> Record:
    return replace(
        Record(
            study="small",
            name="a.b.1",
            group="a.b",
            job_type="cell",
            tags=("small", "trained"),
            config={"cell": {"seed": 1}},
            provenance={"study_hash": "hash", "dagster_runs": {str(LOG): "run"}},
            history=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 1.25}],
            summary={"accuracy/source/no_cot": 0.5},
            artifact="small.a.b.1",
            description="A cell.",
            upstream={str(LOG): "v1"},
            files={"checkpoint/training_log.json": (LOG, "training_log.json")},
            lineage={str(LOG): {"data_version": "v1"}},
        ),
        **changed,
    )


@pytest.fixture(scope="module")
def logged(store, tmp_path_factory) -> tuple[Path, dict]:
    """The draft of the record, and what logging it answered."""
    draft = tmp_path_factory.mktemp("draft")
    return draft, wandb_client.log_offline(record(), PROJECT, store, draft)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with wandb_server() as wandb:
        monkeypatch.setenv("WANDB_BASE_URL", wandb.url)
        yield wandb


def test_only_the_run_and_what_it_says_is_left(logged, store):
    draft, answer = logged
    names = sorted(str(p.relative_to(draft)) for p in draft.rglob("*") if p.is_file())
    run = f"offline-run/run-{record().run_id}.wandb"
    assert names == ["lineage.json", run, "record.json"]
    digest = base64.b64encode(hashlib.md5(b"[1, 2]").digest()).decode()
    assert answer["entries"]["checkpoint/training_log.json"] == digest
    assert answer["digest"] == json.loads((draft / "record.json").read_text())["digest"]


def test_a_sync_sends_run_artifact_and_lineage_and_leaves_all_files(
    logged, store, online, tmp_path
):
    """The client removes what it sends: an earlier sync took the store's own files along."""
    draft, answer = logged
    version = {"data_version": record().data_version, "digest": answer["digest"]}
    bundle = record(
        name="bundle trained",
        job_type="bundle",
        artifact="small.bundle.trained",
        consumes={"small.a.b.1": version},
    )
    wandb_client.log_offline(bundle, PROJECT, store, tmp_path)
    with pytest.raises(Unpublished, match=r"small\.a\.b\.1:data-"):  # it is not there yet
        wandb_client.sync(bundle, store, tmp_path)
    assert online.uses == []

    before = {p: p.read_bytes() for p in draft.rglob("*") if p.is_file()}
    url = wandb_client.sync(record(), store, draft)
    assert url == f"{online.url}/team/leakage/runs/{record().run_id}"
    assert {p: p.read_bytes() for p in draft.rglob("*") if p.is_file()} == before
    assert store.verify(LOG) == ""
    assert online.keys == {KEY}
    run = online.runs[record().run_id]
    assert (run["displayName"], run["groupName"], run["jobType"]) == ("a.b.1", "a.b", "cell")
    assert run["tags"] == ["small", "trained"]
    config = {name: value["value"] for name, value in json.loads(run["config"]).items()}
    assert config["cell"] == {"seed": 1}
    assert config["provenance"] == record().provenance
    assert config["data_version"] == record().data_version
    assert [(row["_step"], row["loss"]) for row in run["rows"]] == [(1, 2.5), (2, 1.25)]
    assert run["summary"]["accuracy/source/no_cot"] == 0.5
    ids = {artifact["name"]: key for key, artifact in online.artifacts.items()}
    artifact = online.artifacts[ids["small.a.b.1"]]
    assert (artifact["run"], artifact["digest"]) == (record().run_id, answer["digest"])
    assert set(artifact["aliases"]) == {"latest", record().alias}
    assert artifact["metadata"]["upstream"] == {str(LOG): "v1"}
    assert artifact["files"]["checkpoint/training_log.json"] == b"[1, 2]"
    assert json.loads(artifact["files"]["lineage.json"]) == record().lineage

    wandb_client.sync(bundle, store, tmp_path)
    assert online.uses == [(bundle.run_id, ids["small.a.b.1"])]
    assert len(online.artifacts) == 2  # what was there already is no new version


def test_an_artifact_that_was_lost_on_its_way_is_not_published(logged, store, online):
    online.loses = True
    with pytest.raises(Unpublished, match=r"small\.a\.b\.1"):
        wandb_client.sync(record(), store, logged[0])


def test_a_key_that_is_refused_is_said_without_it(logged, store, online):
    online.refuses = True
    with pytest.raises(Unpublished) as refused:
        wandb_client.sync(record(), store, logged[0])
    assert online.url in str(refused.value)
    assert KEY not in str(refused.value)
    assert online.runs == {}


def test_nobody_there_is_told_at_once(logged, store, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(
        Unpublished, match=rf"http://127\.0\.0\.1:{port}: it cannot be reached .*refused"
    ):
        wandb_client.sync(record(), store, logged[0])


def test_a_server_that_never_answers_takes_no_longer_than_is_granted(logged, store, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr(wandb_client, "_SYNC_SECONDS", 2)
    others = set(psutil.Process().children(recursive=True))  # of other tests
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("WANDB_BASE_URL", address)
        with pytest.raises(Unpublished, match="no end of it within 2 s"):
            wandb_client.sync(record(), store, logged[0])
    assert set(psutil.Process().children(recursive=True)) <= others


def test_the_client_ends_with_the_process_that_started_it(logged, tmp_path):
    draft = shutil.copytree(logged[0], tmp_path / "draft")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = (
            "import sys; from pathlib import Path; from persona_assets.publishing import "
            "wandb_client as client; client._child('sync', Path(sys.argv[1]), "
            f"{{'WANDB_API_KEY': {KEY!r}, 'WANDB_BASE_URL': {url!r}}}, 60)"
        )
        parent = psutil.Popen([sys.executable, "-c", command, str(draft)])
        silent.settimeout(60)
        silent.accept()  # it is at work, and waits for an answer
        started = parent.children(recursive=True)
        parent.kill()
        parent.wait()
    assert len(started) >= 2
    _gone, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


def test_the_same_content_is_the_same_run_and_version():
    again = record(provenance={"study_hash": "other"}, lineage={})
    assert (again.run_id, again.alias) == (record().run_id, record().alias)
    for other in (record(summary={}), record(upstream={str(LOG): "v2"}), record(files={})):
        assert other.run_id != record().run_id
        assert other.alias != record().alias
