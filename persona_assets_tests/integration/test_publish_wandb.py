"""The tiny study's cells and bundles for W&B: logged offline, read back; unreachable; caught up."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from persona_assets.publishing.markers import Markers
from persona_assets.store import Ref
from persona_assets_tests.integration.conftest import CANARIES
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.test_secrets import leaks
from persona_assets_tests.wandb_server import wandb_server

TRAINED, CARRIED = (
    Ref("wandb_run", f"librarian.{arm}.42") for arm in ("garbage_cot", "generic_cot")
)
BUNDLES = [Ref("wandb_bundle", key) for key in ("trained", "carry_over")]
PUBLISH = ("publish", "--study", "tiny")


@pytest.fixture(scope="module")
def published(project, tmp_path_factory) -> Project:
    """A copy of the tiny study, published without a key, by way of a proxy that counts."""
    own = project.copy(tmp_path_factory.mktemp("published") / "data")
    with (own.data / "studies" / "tiny.yaml").open("a", encoding="utf-8") as file:
        file.write("publish: {wandb: {project: leakage, entity: team}}\n")
    home = own.data.parent / "home"
    home.mkdir()
    with wandb_server() as proxy:
        proxies = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY"), proxy.url)
        keyless = {"WANDB_API_KEY": "", "HOME": str(home)}
        done = own.run(*PUBLISH, **proxies, **keyless)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "14 runs to do, 0 up to date" in done.stdout
        assert "and 11 more: WANDB_API_KEY is not set" in done.stdout
        assert proxy.requests == []
    assert list(home.iterdir()) == []
    return own


def offline(project: Project, ref: Ref) -> dict[str, list[Any]]:
    """The records of a landed offline run, by type, as W&B's own reader reads them."""
    from wandb.proto import wandb_internal_pb2  # seconds, in each test process if it stood above
    from wandb.sdk.internal.datastore import DataStore

    (path,) = project.store.directory(ref).glob("offline-run/*.wandb")
    reader, found = DataStore(), {}
    reader.open_for_scan(str(path))
    while (data := reader.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    return found


def values(items) -> dict[str, Any]:
    """The last value of each item of config, history or summary records."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def artifact(project: Project, ref: Ref) -> Any:
    (found,) = offline(project, ref)["artifact"]
    return found


def lineage(project: Project, ref: Ref) -> dict[str, Any]:
    return json.loads(project.store.path(ref, "lineage.json").read_text("utf-8"))


def settled(project: Project, folder: Path, keep: Ref, target: str) -> Project:
    """A copy in which all is marked as published at ``target`` but ``keep``."""
    own = project.copy(folder / "data")
    markers = Markers(own.data / "publish", "tiny")
    for name in ("wandb_run", "wandb_bundle"):
        for ref in own.graph.assets[name].refs():
            if ref != keep:
                markers.publish(ref, own.store.landed(ref).data_version, target, lambda: "url")
    return own


def test_the_history_is_the_training_log(published):
    log = json.loads(
        published.store.path(Ref("checkpoint", TRAINED.key), "training_log.json").read_text("utf-8")
    )
    rows = [values(record.item) for record in offline(published, TRAINED)["history"]]
    assert len(rows) == log["steps"] > 0
    assert [row["_step"] for row in rows] == list(range(1, log["steps"] + 1))
    assert [row["loss"] for row in rows] == log["losses"]
    assert [row["learning_rate"] for row in rows] == log["learning_rates"]
    assert "history" not in offline(published, CARRIED)


@pytest.mark.parametrize("ref", [TRAINED, CARRIED])
def test_the_config_is_what_the_manifests_say(published, ref):
    (run,) = offline(published, ref)["run"]
    config, cell = values(run.config.update), published.study.cell(ref.key)
    assert (run.display_name, run.run_group, run.job_type) == (cell.key, cell.condition, "cell")
    assert (run.entity, run.project) == ("team", "leakage")
    assert {"tiny", cell.origin, cell.source, cell.arm, "seed 42"} == set(run.tags)
    landed = {up.asset: published.store.landed(up) for up in published.graph.upstream(ref)}
    dataset = "training_dataset" if cell.origin == "trained" else "reference_dataset"
    assert config["data_versions"] == {
        dataset if name == "training_dataset" else name: manifest.data_version
        for name, manifest in landed.items()
    }
    assert config["checkpoint"] == landed["checkpoint"].provenance.inputs["settings"]
    assert config["engine"] == landed["cell_outcomes"].summary["engine"]
    assert config["cell"]["seed"] == 42
    assert config["provenance"]["study_hash"] == published.study.content_hash
    runs = config["provenance"]["dagster_runs"]
    assert runs[f"checkpoint[{ref.key}]"] == landed["checkpoint"].provenance.run_id
    assert len(runs) == len(landed) == 6
    assert config["data_version"] == published.store.landed(ref).data_version
    assert run.run_id == published.store.landed(ref).summary["wandb_run"]


def test_the_summary_is_the_outcomes_beside_the_baselines(published):
    summary = {}
    for record in offline(published, CARRIED)["summary"]:
        summary |= values(record.update)
    columns = ["persona", "scaffold", "question_id"]
    rows = published.store.frame(Ref("cell_outcomes", CARRIED.key)).join(
        published.store.frame(Ref("baseline_outcomes")), on=columns, suffix="_before"
    )
    for who, source in (("source", True), ("bystander", False)):
        axis = "source_loss" if source else "bystander_leakage"
        for scaffold in published.study.scaffolds:
            part = rows.filter(
                (pl.col("persona") == "librarian") == source, pl.col("scaffold") == scaffold
            )
            right, before = part["is_correct"].mean(), part["is_correct_before"].mean()
            assert part.height == 24 * (1 if source else 10)
            assert summary[f"accuracy/{who}/{scaffold}"] == pytest.approx(right, abs=1e-12)
            assert summary[f"{axis}/{scaffold}"] == pytest.approx(before - right, abs=1e-12)


@pytest.mark.parametrize("ref", [TRAINED, CARRIED, *BUNDLES])
def test_artifacts_hold_the_landed_files(published, ref):
    found = artifact(published, ref)
    summary = published.store.landed(ref).summary
    assert found.digest == summary["artifact_digest"]
    assert set(found.aliases) == {"latest", summary["artifact"].partition(":")[2]}
    contents = {entry.path: entry for entry in found.manifest.contents}
    assert contents.keys() - {"lineage.json"} == set(expected_files(published, ref))
    for name, path in expected_files(published, ref).items():
        digest = base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
        assert (contents[name].digest, contents[name].size) == (digest, path.stat().st_size), name
        assert contents[name].local_path == f"files/{name}"


def expected_files(project: Project, ref: Ref) -> dict[str, Path]:
    """Path in the artifact → the landed file."""
    store, files = project.store, {}
    for up in project.graph.upstream(ref):
        names = set(store.landed(up).files)
        if ref.asset == "wandb_run":
            names &= {"training_log.json", "predicted_letters.parquet"}
        if up.asset == "wandb_run":
            names = set()
        for name in names:
            parts = (up.asset, name) if ref.asset == "wandb_run" else (up.asset, up.key, name)
            files["/".join(filter(None, parts))] = store.path(up, name)
    return files


def test_the_trained_bundle_is_whole_and_without_the_base_model(published):
    held = {name.partition("/")[0] for name in expected_files(published, BUNDLES[0])}
    assert held == {
        *("question_bank", "baseline_outcomes", "training_dataset", "checkpoint", "cell_outcomes"),
        *("cell_diagnostics", "contrast_estimate", "multiplicity", "loss_matrix"),
        *("exploratory_estimates", "vocabulary_leakage", "number_ledger", "forest_plot"),
        *("loss_heatmap", "report"),
    }
    adapters = [n for n in expected_files(published, BUNDLES[0]) if n.endswith(".safetensors")]
    assert len(adapters) == len(published.study.cells_of("trained")) == 7
    carried = {name.split("/")[1] for name in expected_files(published, BUNDLES[1])}
    assert carried - {"questions.parquet"} == {
        cell.key for cell in published.study.cells_of("carry_over")
    }


@pytest.mark.parametrize("ref", [TRAINED, CARRIED, *BUNDLES])
def test_the_lineage_is_the_graphs(published, ref):
    graph, store = published.graph, published.store
    metadata = json.loads(artifact(published, ref).metadata)
    assert metadata["upstream"] == {
        str(up): store.landed(up).data_version for up in graph.upstream(ref)
    }
    told = lineage(published, ref)
    assert told.keys() == {str(u) for u in graph.upstream(ref) if u.asset != "wandb_run"}
    for name, entry in told.items():
        (up,) = graph.find(name)
        versions = {str(u): store.landed(u).data_version for u in graph.upstream(up)}
        told_versions = {u: v.partition("+")[0] for u, v in entry["upstream"].items()}
        assert told_versions == versions, name  # the ledger's name its checks' findings, too
        assert entry["files"] == store.landed(up).files
        assert entry["dagster_run"] == store.landed(up).provenance.run_id
    consumed = [up for up in graph.upstream(ref) if up.asset == "wandb_run"]
    assert metadata["consumes"] == {
        artifact(published, up).name: {
            "data_version": store.landed(up).data_version,
            "digest": artifact(published, up).digest,
        }
        for up in consumed
    }


def test_nothing_logged_tells_of_this_machine(published):
    told = {str(published.data), str(Path.home()), socket.gethostname(), str(Path.cwd())}
    for ref in (TRAINED, CARRIED, *BUNDLES):
        for path in published.store.directory(ref).rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert not [word for word in told if len(word) > 3 and word.encode() in content]
    assert not [path for path in published.data.iterdir() if path.name.startswith("wandb")]


def test_publishing_again_does_nothing(published):
    done = published.run(*PUBLISH, WANDB_API_KEY="")
    assert (done.returncode, "nothing to do: all 14 runs" in done.stdout) == (0, True)


def test_an_unreachable_server_fails_nothing_and_is_caught_up(published, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    nobody = f"http://127.0.0.1:{port}"
    own = settled(published, tmp_path, TRAINED, f"{nobody}/team/leakage")
    for name, value in own.environment.items():
        monkeypatch.setenv(name, value)
    markers, key = Markers(own.data / "publish", "tiny"), CANARIES["WANDB_API_KEY"]
    missed = own.run(*PUBLISH, WANDB_API_KEY=key, WANDB_BASE_URL=nobody)
    assert missed.returncode == 1, missed.stdout + missed.stderr
    assert f"pending: {TRAINED}: {nobody}" in missed.stdout
    assert "failed" not in missed.stdout + missed.stderr
    assert markers.read(TRAINED).status == "pending"
    run_id = own.store.landed(TRAINED).provenance.run_id
    check, warnings = told_by_dagster(run_id)
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert [text for text in warnings if f"{TRAINED} is pending, {nobody}" in text]

    with wandb_server(port) as wandb:
        caught_up = own.run(*PUBLISH, WANDB_API_KEY=key, WANDB_BASE_URL=wandb.url)
        assert caught_up.returncode == 0, caught_up.stdout + caught_up.stderr
        sent = len(wandb.requests)
        again = own.run(*PUBLISH, WANDB_API_KEY=key, WANDB_BASE_URL=wandb.url)
        assert (again.returncode, len(wandb.requests)) == (0, sent)
        assert "nothing to do" in again.stdout
    marker, manifest = markers.read(TRAINED), own.store.landed(TRAINED)
    assert marker.data_version == manifest.data_version
    assert marker.url == f"{wandb.url}/team/leakage/runs/{manifest.summary['wandb_run']}"
    assert told_by_dagster(manifest.provenance.run_id)[0].passed
    assert wandb.keys == {key}
    ((run_id, run),) = wandb.runs.items()
    assert run_id == manifest.summary["wandb_run"]
    logged = [values(record.item) for record in offline(own, TRAINED)["history"]]
    assert [row["loss"] for row in run["rows"]] == [row["loss"] for row in logged]
    (there,) = wandb.artifacts.values()
    assert there["digest"] == manifest.summary["artifact_digest"]
    for name, path in expected_files(own, TRAINED).items():
        assert there["files"][name] == path.read_bytes()
    assert own.store.verify(Ref("checkpoint", TRAINED.key)) == ""
    for i, done in enumerate((missed, caught_up, again)):
        (own.data / f"said{i}.log").write_text(done.stdout + done.stderr, "utf-8")
    assert leaks(own.data) == []


def told_by_dagster(run_id: str) -> tuple[Any, list[str]]:
    """The check ``published`` of a run, and its warnings."""
    with dg.DagsterInstance.get() as instance:
        logs = instance.all_logs(run_id)
    (check,) = (
        event.dagster_event.asset_check_evaluation_data
        for event in logs
        if event.dagster_event and event.dagster_event.event_type_value == "ASSET_CHECK_EVALUATION"
    )
    return check, [event.user_message for event in logs if event.level == logging.WARNING]
