"""A study published to a hub on loopback and imported by another, by the real command line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from subprocess import CompletedProcess

import dagster as dg
import pytest
import yaml
from huggingface_hub import constants

from persona_assets import environment, publisher
from persona_assets.assets import base
from persona_assets.definitions import study_definitions
from persona_assets.store import Ref
from persona_assets.training.checkpoints import adapter_hash
from persona_assets_tests.hub_server import Refusal, point_client_at
from persona_assets_tests.hub_writes import ATTRIBUTES, WritableHub, writable_hub
from persona_assets_tests.integration.conftest import CANARIES
from persona_assets_tests.integration.project import Project
from persona_assets_tests.integration.test_secrets import leaks

PUBLISH = "\npublish: {hub: {dataset: owner/tiny-rows, model: owner/tiny, license: apache-2.0}}\n"
DATASET, MODEL = Ref("hub_upload", "dataset"), Ref("hub_upload", "model")
IMPORTED = ("librarian.garbage_cot.42", "comedian.garbage_cot.42")
TOKEN = CANARIES["HF_TOKEN"]


@dataclass
class Bench:
    """The tiny study with repositories in its file, and the hub that has them."""

    project: Project
    hub: WritableHub

    def run(self, *arguments: str, **variables: str) -> CompletedProcess[str]:
        """A command with the hub for its hub; what it says is kept beside the data."""
        variables = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(self.project.data / "hf"),
            "HF_TOKEN": TOKEN,
        } | variables
        done = self.project.run(*arguments, **variables)
        with (self.project.data / "publish.log").open("a") as log:
            log.write(done.stdout + done.stderr)
        return done

    def materialize(
        self, patch: pytest.MonkeyPatch, ref: Ref, *, force: bool = False, token: str | None = TOKEN
    ) -> dg.ExecuteInProcessResult:
        """A Dagster run in this process, which is cheaper than a command."""
        patch.setenv(environment.DATA, str(self.project.data))
        patch.delenv("HF_TOKEN", raising=False)
        if token:
            patch.setenv("HF_TOKEN", token)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        point_client_at(self.hub.endpoint, patch)
        job = study_definitions(self.project.study).resolve_job_def("hub_uploads")
        with dg.DagsterInstance.ephemeral() as instance:
            return job.execute_in_process(
                instance=instance,
                partition_key=ref.key,
                run_config={"ops": {"tiny__hub_upload": {"config": {"force": force}}}},
                raise_on_error=False,
            )

    def commits(self) -> dict[str, list[str]]:
        """The commits of each repository, less the one that it was made with."""
        return {r.name: list(r.commits)[1:] for r in self.hub.repositories}

    def recorded(self, ref: Ref) -> dict:
        return json.loads(self.project.store.path(ref, "commit.json").read_text())


@pytest.fixture(scope="module")
def bench(project, tmp_path_factory) -> Iterator[Bench]:
    own = project.copy(tmp_path_factory.mktemp("published") / "data")
    study = own.data / "studies" / "tiny.yaml"
    study.write_text(study.read_text("utf-8") + PUBLISH, "utf-8")
    with writable_hub(TOKEN) as hub:
        yield Bench(own, hub)


@pytest.fixture(scope="module")
def published(bench) -> Bench:
    """Both repositories, published once."""
    done = bench.run("publish", "--study", "tiny", "--to", "hub")
    assert done.returncode == 0, done.stdout + done.stderr
    for ref in (DATASET, MODEL):
        at = bench.recorded(ref)
        assert f"{ref}: {at['repo_type']} {at['repo']} at {at['commit']}" in done.stdout
    return bench


def test_without_a_token_it_says_so_and_asks_nothing(bench, monkeypatch):
    assert not bench.hub.requests, "this test comes first"
    done = bench.materialize(monkeypatch, MODEL, token=None)
    assert not done.success
    (failure,) = [e for e in done.all_events if e.is_step_failure]
    message = failure.event_specific_data.error.cause.message
    assert "model owner/tiny cannot be uploaded to: HF_TOKEN is not set, and nothing was" in message
    assert bench.hub.requests == []
    assert bench.project.store.manifest(MODEL) is None


def test_what_landed_is_on_the_hub_in_one_commit_a_repository(published):
    store = published.project.store
    definitions = study_definitions(published.project.study).resolve_asset_graph()
    tags = definitions.get(dg.AssetKey(["tiny", "hub_upload"])).tags
    assert tags["partitioned_by"] == "repository"
    states = published.project.states()
    assert states[DATASET] == states[MODEL] == "fresh"
    model = published.hub.repository("owner/tiny", "model")
    expected = {"study/tiny.yaml", "README.md", *ATTRIBUTES}
    for cell in published.project.study.cells:
        folder = store.directory(Ref("checkpoint", cell.key))
        for name in store.landed(Ref("checkpoint", cell.key)).files:
            expected.add(f"{cell.key}/{name}")
            assert model.files[f"{cell.key}/{name}"] == (folder / name).read_bytes()
    assert model.files.keys() == expected
    rows = published.hub.repository("owner/tiny-rows", "dataset")
    warehouse = store.path(Ref("warehouse"), "warehouse.duckdb")
    assert rows.files["warehouse.duckdb"] == warehouse.read_bytes()
    assert {"report/report.html", "report/report.md", "questions.parquet"} <= rows.files.keys()
    assert len([path for path in rows.files if path.startswith("training_dataset/")]) == 12
    assert model.private
    assert rows.private
    for ref, repository in ((MODEL, model), (DATASET, rows)):
        assert published.recorded(ref) == {
            "repo": repository.name,
            "repo_type": repository.kind,
            "commit": repository.head,
            "files": len(repository.files) - len(ATTRIBUTES),
        }
        assert store.landed(ref).summary["commit"] == repository.head
    assert not (published.project.data / "hf" / "hub").exists()  # no copy in the client's cache


def test_publishing_again_makes_no_commit(published, monkeypatch):
    """The command asks for both again where there is a token, and the hub has them as they are."""
    commits, project = published.commits(), published.project
    records, before = (
        [published.recorded(r) for r in (DATASET, MODEL)],
        project.store.landed(MODEL),
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    units = publisher.plan(project.graph, project.store, ["hub"]).units
    assert [(unit.refs, unit.again) for unit in units] == [((DATASET,), True), ((MODEL,), True)]
    published.hub.requests.clear()
    for ref in (DATASET, MODEL):
        assert published.materialize(monkeypatch, ref, force=True).success
    assert set(published.hub.steps()) == {"create"}  # it was looked at, and nothing was sent
    assert published.commits() == commits
    assert [published.recorded(r) for r in (DATASET, MODEL)] == records
    again = project.store.landed(MODEL)
    assert again.provenance.run_id != before.provenance.run_id
    assert again.data_version == before.data_version
    assert again.summary["written"] == again.summary["removed"] == 0
    monkeypatch.delenv("HF_TOKEN")
    units = publisher.plan(project.graph, project.store, ["hub"]).units
    assert [unit.again for unit in units] == [False, False]


def test_another_study_imports_its_cells_and_finds_the_same(published):
    project, model = published.project, published.hub.repository("owner/tiny", "model")
    # The section as the card has it; the commit as it was recorded.
    card = model.files["README.md"].decode()
    (section,) = re.findall(r"```yaml\n(carry_over:\n.*?)```", card, re.DOTALL)
    section = section.replace("COMMIT", published.recorded(MODEL)["commit"])
    study = yaml.safe_load((project.data / "studies" / "tiny.yaml").read_text("utf-8"))
    study |= {"name": "second"} | yaml.safe_load(section)
    study["arms"]["garbage_cot"]["origin"] = "carry_over"
    del study["publish"]
    path = project.data / "studies" / "second.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), "utf-8")
    second = Project(project.data, "second")
    for asset in ("tokenizer", "question_bank", "base_model"):  # as it would make them itself
        shutil.copytree(project.store.folder(Ref(asset)), second.store.folder(Ref(asset)))
    assert {second.states()[Ref(asset)] for asset in ("question_bank", "base_model")} == {"fresh"}

    evaluated = ("run", "--study", "second", "--cells", "*.garbage_cot.42", "--workers", "1")
    done = published.run(*evaluated, "--up-to", "cell_outcomes")
    assert done.returncode == 0, done.stdout + done.stderr
    for key in IMPORTED:
        ours, theirs = (p.store.landed(Ref("checkpoint", key)) for p in (second, project))
        assert ours.summary["origin"] == "carry_over"
        assert ours.summary["source"] == f"owner/tiny at {model.head}"
        assert ours.data_version == theirs.data_version
        ours, theirs = (p.store.frame(Ref("cell_outcomes", key)) for p in (second, project))
        same = [c for c in theirs.columns if c not in ("study", "origin", "run_id")]
        assert {"letter_logprobs", "rationale", "checkpoint_sha256"} <= set(same)
        assert len(theirs) == 11 * 4 * 24
        assert ours.select(same).equals(theirs.select(same))


def test_a_changed_cell_is_one_commit_of_its_files_and_the_card(published, monkeypatch):
    """Its outcomes are then of another checkpoint: the warehouse is not published until made."""
    store, ref = published.project.store, Ref("checkpoint", IMPORTED[0])
    before, commits = store.landed(ref), published.commits()
    with store.draft(ref) as draft:
        for name in before.files:
            shutil.copyfile(store.path(ref, name), draft / name)
        weights = (draft / "adapter_model.safetensors").read_bytes()
        (draft / "adapter_model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
        other = adapter_hash(draft)
        store.land(
            ref,
            draft,
            provenance=before.provenance,
            audits=before.audits,
            summary=before.summary,
            data_version=other,
        )
    assert published.project.states()[MODEL] == "stale"
    todo = publisher.plan(published.project.graph, published.project.store, ["hub"])
    assert [unit.refs for unit in todo.units] == [(MODEL,)]
    (left_out,) = todo.left_out
    assert left_out.startswith("hub_upload[dataset] (")
    assert published.materialize(monkeypatch, MODEL).success
    rows = published.hub.repository("owner/tiny-rows", "dataset")
    model = published.hub.repository("owner/tiny", "model")
    assert list(rows.commits)[1:] == commits["owner/tiny-rows"]
    assert list(model.commits)[1:-1] == commits["owner/tiny"]
    old, new = list(model.commits.values())[-2:]
    changed = {path for path in old.keys() | new.keys() if old.get(path) != new.get(path)}
    assert changed == {f"{IMPORTED[0]}/adapter_model.safetensors", "README.md"}
    assert published.recorded(MODEL)["commit"] == model.head
    assert f"`checkpoint[{IMPORTED[0]}]` | `{other}`" in new["README.md"].decode()


def test_a_busy_hub_is_asked_again_by_the_asset(published, monkeypatch):
    monkeypatch.setattr(base, "RETRY_WAITS", (0.1, 0.1))
    before = published.project.store.landed(MODEL)
    published.hub.faults = {"create": iter([Refusal(503)])}
    done = published.materialize(monkeypatch, MODEL, force=True)
    assert done.success
    retries = [e for e in done.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]
    assert len(retries) == 1
    assert published.project.store.landed(MODEL).data_version == before.data_version
    (event,) = done.get_asset_materialization_events()
    shown = event.materialization.metadata
    assert shown["commit"].value == published.recorded(MODEL)["commit"]
    assert f"revision: {shown['commit'].value}" in shown["import"].value
    assert shown["url"].value.endswith(f"/owner/tiny/tree/{shown['commit'].value}")


def test_the_token_is_in_nothing_that_was_made_or_said(published):
    """Last of all: in logs, databases, landed files, and what went to the hub."""
    assert "publish.log" in {path.name for path in published.project.data.iterdir()}
    assert leaks(published.project.data) == []
    for repository in published.hub.repositories:
        assert not [p for p, content in repository.files.items() if TOKEN.encode() in content]
    told = [r for r in published.hub.requests if TOKEN in (r.token or "")]
    assert told
    assert not [r for r in told if "/inbox/" in r.path or "/storage/" in r.path]
