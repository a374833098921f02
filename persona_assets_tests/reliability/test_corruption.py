"""A sample of the damage, and that what is used in spite of it is noticed."""

from __future__ import annotations

import random
from unittest.mock import ANY

import pytest

from persona_assets import manifest as manifest_module
from persona_assets import store as store_module
from persona_assets.store import Ref
from persona_assets_tests.reliability import corruption
from persona_assets_tests.reliability.bench import bench
from persona_assets_tests.reliability.corruption import Extent, damage, tried

SAMPLE = Extent(
    files=1,
    manifests=1,
    edges=4,
    study=6,
    questions=10,
    databases=1,
    healed=("tokenizer", "training_dataset"),
)


def test_a_sample_is_noticed_named_and_healed(project, tmp_path):
    found = tried(project.data, tmp_path / "work", 7, SAMPLE)
    assert [fault for row in found for fault in row.faults] == []
    counts = {row.fault.partition(":")[0]: row.tried for row in found}
    assert counts["a Parquet table"] >= 2 * 13
    assert counts["a manifest"] == 2 * len(project.graph.assets)
    assert counts["an input of a function that makes a partition, flipped"] == 4
    assert counts["one partition of each asset damaged at once"] == 1 + 2 + 1
    assert min(counts.values()) >= 1


def test_damage_is_always_some_and_the_same_for_a_seed(tmp_path):
    path, content = tmp_path / "file", bytes(range(256)) * 4
    found = []
    for seed in [*range(40), *range(40)]:
        path.write_bytes(content)
        damage(path, random.Random(seed), cut=seed % 2 == 0)
        found.append(path.read_bytes())
        assert found[-1] != content
        assert (len(found[-1]) < len(content)) == (seed % 2 == 0)
    assert found[:40] == found[40:]
    assert len(set(found)) == 40


@pytest.fixture
def on(own_project):
    with bench(own_project.data) as found:
        yield found


def test_a_store_that_believes_its_files_is_noticed(project, on, monkeypatch):
    """Without the hash, flips are read, by the functions too."""
    whole = {
        path: entry["sha256"]
        for ref in on.graph.refs
        for manifest in [on.store.landed(ref)]
        for name, entry in manifest.files.items()
        for path in [on.store.folder(ref) / manifest.version / name]
    }
    monkeypatch.setattr(store_module, "_hash_once", lambda path, *state: whole[path])
    rng = random.Random(7)
    files = corruption._files(on, project.data, 1, rng)
    assert all(row.lost == row.tried // 2 for row in files)  # what is cut has another size
    path = on.store.path(Ref("question_bank"), "questions.parquet")
    assert f"{path} was read" in " ".join(fault for row in files for fault in row.faults)


def test_manifests_without_a_hash_of_their_own_are_noticed(project, on, monkeypatch):
    monkeypatch.setattr(manifest_module, "_seal", lambda raw: ANY)
    row = corruption._manifests(on, project.data, 3, random.Random(7))
    assert row.lost > 0
    assert "it was read, with other content" in row.faults[0]


def test_databases_that_are_not_looked_at_are_noticed(project, on, monkeypatch):
    monkeypatch.setattr("persona_assets.dagster_databases._damage", lambda path: "")
    monkeypatch.setattr(corruption, "DATABASES", ("history/runs/index.db",))
    row = corruption._databases(on, project.data, 1, random.Random(7))
    assert row.lost > 0
    assert "no clear error" in row.faults[0]


def test_a_question_file_that_is_no_input_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr("persona_assets.asset_table._local_files", lambda *_: {})
    row = corruption._questions(tmp_path, 3, random.Random(7))
    assert row.lost == row.tried - 2
    assert "not noticed" in row.faults[0]
