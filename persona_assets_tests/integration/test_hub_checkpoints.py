"""A study whose carry-over checkpoints are on a hub on loopback, by the real command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load, save

from persona_assets.residency import resident_model
from persona_assets.store import Ref
from persona_assets.training.checkpoints import adapted
from persona_assets_tests.hub_server import REVISION, STORAGE, Fault, Request, hub_server
from persona_assets_tests.integration.project import Project

KEY = "librarian.persona_cot.42"
CHECKPOINT, OUTCOMES = Ref("checkpoint", KEY), Ref("cell_outcomes", KEY)
FOLDER = "carried/librarian_persona_cot_42"
WEIGHTS = "adapter_model.safetensors"
LOCAL = """\
  kind: local
  revision: lock
  prior_training: *recipe
"""
HUB = f"""\
  kind: hub
  repo: owner/name
  revision: {REVISION}
  folder: carried/{{source}}_{{arm}}_{{seed}}
  format: adapter
  keep: until_evaluated
  training: *recipe
"""


def edit(project: Project, before: str, after: str) -> None:
    study = project.data / "studies" / "tiny.yaml"
    text = study.read_text("utf-8")
    assert before in text
    study.write_text(text.replace(before, after), "utf-8")


@pytest.fixture
def carried(own_project, tmp_path, monkeypatch) -> Project:
    """The tiny study, complete, with a hub for the place that its checkpoints come from."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    edit(own_project, LOCAL, HUB)
    return own_project


@contextmanager
def hub(monkeypatch, files: Mapping[str, bytes], **options) -> Iterator[list[Request]]:
    requests: list[Request] = []
    with hub_server("owner/name", files, requests=requests, **options) as endpoint:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        yield requests


def adapter_files(project: Project) -> dict[str, bytes]:
    folder = project.store.directory(CHECKPOINT)
    return {
        f"{FOLDER}/{name}": (folder / name).read_bytes()
        for name in (WEIGHTS, "adapter_config.json")
    }


def versions_on_disk(project: Project) -> list[Path]:
    return [path for path in project.store.folder(CHECKPOINT).iterdir() if path.is_dir()]


def test_an_adapter_is_fetched_used_released_and_fetched_again(carried, monkeypatch):
    files, store = adapter_files(carried), carried.store
    before = {ref: store.landed(ref) for ref in (CHECKPOINT, OUTCOMES)}
    assert carried.states()[CHECKPOINT] == "stale"  # it came from elsewhere
    faults = {f"{FOLDER}/{WEIGHTS}": [None, Fault.CUT]}
    with hub(monkeypatch, files | {f"{FOLDER}/optimizer.pt": b"pickle"}, faults=faults) as requests:
        done = carried.run("run", "--study", "tiny", "--cells", KEY, "--workers", "1")
        assert done.returncode == 0, done.stdout + done.stderr
    fetched = store.landed(CHECKPOINT)
    assert fetched.summary["source"] == f"owner/name at {REVISION}"
    assert fetched.data_version == before[CHECKPOINT].data_version
    assert fetched.files.keys() == {WEIGHTS, "adapter_config.json"}
    (fits,) = fetched.audits
    assert (fits.name, fits.status) == ("checkpoint_fits_base", "passed")
    assert not any("optimizer" in request.path for request in requests)
    # The same adapter: what was evaluated stands, and nothing needs the files any more.
    assert store.landed(OUTCOMES) == before[OUTCOMES]
    assert fetched.released
    assert versions_on_disk(carried) == []
    states = carried.states()
    assert states[CHECKPOINT] == states[OUTCOMES] == "fresh"

    # To be evaluated again: the run sees by itself that the files are to be fetched again.
    (store.folder(OUTCOMES) / "manifest.json").unlink()
    with hub(monkeypatch, files) as requests:
        done = carried.run("run", "--study", "tiny", "--cells", KEY, "--workers", "1")
        assert done.returncode == 0, done.stdout + done.stderr
    assert max(r.sent for r in requests if r.path == f"{STORAGE}{FOLDER}/{WEIGHTS}") == len(
        files[f"{FOLDER}/{WEIGHTS}"]
    )
    again = store.landed(OUTCOMES)
    assert again.provenance.run_id == store.landed(CHECKPOINT).provenance.run_id
    assert again.provenance.run_id != before[OUTCOMES].provenance.run_id
    assert again.data_version == before[OUTCOMES].data_version
    assert store.landed(CHECKPOINT).released
    assert versions_on_disk(carried) == []
    states = carried.states()
    assert states[CHECKPOINT] == states[OUTCOMES] == "fresh"


def test_a_merged_model_answers_as_its_adapter_does(carried, monkeypatch, tmp_path):
    store, folder = carried.store, tmp_path / "merged"
    base = resident_model(store.directory(Ref("base_model")), "float32")
    with adapted(base, store.directory(CHECKPOINT)) as model:
        model.save_pretrained(folder, max_shard_size="1MB")
    files = {f"{FOLDER}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    edit(carried, "format: adapter", "format: merged")
    by_adapter = store.frame(OUTCOMES)
    with hub(monkeypatch, files):
        done = carried.run("run", "--study", "tiny", "--cells", KEY, "--workers", "1")
        assert done.returncode == 0, done.stdout + done.stderr
    fetched = store.landed(CHECKPOINT)
    (fits,) = fetched.audits
    assert (fits.status, fits.observed[:14]) == ("passed", "a whole model ")
    assert len([name for name in fetched.files if name.endswith(".safetensors")]) > 1
    by_model = store.frame(OUTCOMES)
    assert set(by_model["checkpoint_sha256"]) == {fetched.data_version}
    assert set(by_adapter["checkpoint_sha256"]) != {fetched.data_version}
    same = ["persona", "scaffold", "question_id", "predicted_letter", "rationale"]
    assert by_model.select(same).equals(by_adapter.select(same))
    assert fetched.released
    assert versions_on_disk(carried) == []


def test_a_wrong_checkpoint_and_a_missing_folder_are_told_before_any_download(carried, monkeypatch):
    files, store = adapter_files(carried), carried.store
    path = f"{FOLDER}/{WEIGHTS}"
    narrow = {name: tensor[:, :-1].contiguous() for name, tensor in load(files[path]).items()}
    before = store.landed(CHECKPOINT)
    with hub(monkeypatch, files | {path: save(narrow)}) as requests:
        done = carried.run(
            "run", "--study", "tiny", "--cells", "*.persona_cot.42", "--workers", "1"
        )
    assert done.returncode == 1
    assert (
        f"RegistryError: checkpoint of cell {KEY} in folder {FOLDER} of owner/name" in done.stdout
    )
    assert "its weights are not downloaded: adapter_model.safetensors: tensor " in done.stdout
    assert (
        f"HubError: owner/name at {REVISION} has no folder carried/comedian_persona_cot_42. "
        f"Did you mean '{FOLDER}'?"
    ) in done.stdout
    (looked,) = [request for request in requests if request.path == f"{STORAGE}{path}"]
    assert looked.sent <= 100_000 < len(files[path])
    assert store.landed(CHECKPOINT) == before
    assert store.landed(OUTCOMES).provenance.upstream[str(CHECKPOINT)] == before.data_version
