"""The folder registry: content-addressed, verified on the way out, safe under two writers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from persona_assets.hashing import sha256_file
from persona_assets.training.checkpoints import CheckpointError, adapter_hash
from persona_assets.training.registry import FolderRegistry, RegistryError

KEY = "librarian.persona_cot.42"


def adapter(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_text(content)
    (folder / "training_log.json").write_text("{}")
    return folder


@pytest.fixture
def registry(tmp_path) -> FolderRegistry:
    return FolderRegistry(tmp_path / "registry")


def test_what_is_published_is_fetched(registry, tmp_path):
    source = adapter(tmp_path / "a")
    sha256 = registry.publish(KEY, source, {"steps": 52})
    assert sha256 == adapter_hash(source)
    assert registry.fetch(KEY, tmp_path / "b" / "c") == sha256
    fetched = tmp_path / "b" / "c"
    assert adapter_hash(fetched) == sha256
    assert sorted(p.name for p in fetched.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    weights = source / "adapter_model.safetensors"
    entry = json.loads(registry.lock_file.read_text())[KEY]
    assert entry["sha256"] == sha256
    assert entry["extra"] == {"steps": 52}
    assert entry["files"][weights.name] == {"sha256": sha256_file(weights), "bytes": 7}


def test_publishing_again_replaces_the_entry_and_repairs_the_folder(registry, tmp_path):
    first = registry.publish(KEY, adapter(tmp_path / "a"))
    second = registry.publish(KEY, adapter(tmp_path / "b", "other"))
    assert registry.fetch(KEY, tmp_path / "out") == second != first
    (registry.root / second / "adapter_config.json").write_text("spoiled")
    registry.publish(KEY, tmp_path / "b")
    assert registry.fetch(KEY, tmp_path / "out", expected=second) == second


def test_another_hash_than_expected_is_refused(registry, tmp_path):
    sha256 = registry.publish(KEY, adapter(tmp_path / "a"))
    with pytest.raises(
        RegistryError, match=f"the lock file has {sha256}, asked for was {'0' * 64}"
    ):
        registry.fetch(KEY, tmp_path / "out", expected="0" * 64)
    assert not (tmp_path / "out").exists()


def spoil_content(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("tampers")


def spoil_size(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("more weights")


def spoil_existence(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_content, "has sha256"),
        (spoil_size, "has 12 bytes, published 7"),
        (spoil_existence, "is missing"),
    ],
)
def test_a_tampered_checkpoint_is_refused(registry, tmp_path, spoil, says):
    sha256 = registry.publish(KEY, adapter(tmp_path / "a"))
    spoil(registry.root / sha256)
    with pytest.raises(RegistryError) as error:
        registry.fetch(KEY, tmp_path / "out")
    for part in (KEY, "adapter_model.safetensors", says, "published again from the store"):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_lock_entry_that_points_at_another_adapter_is_refused(registry, tmp_path):
    registry.publish(KEY, adapter(tmp_path / "a"))
    other = registry.publish("other.persona_cot.42", adapter(tmp_path / "b", "otherwise"))
    entries = json.loads(registry.lock_file.read_text())
    entries[KEY]["sha256"] = other
    registry.lock_file.write_text(json.dumps(entries))
    with pytest.raises(RegistryError, match="bytes, published 7"):
        registry.fetch(KEY, tmp_path / "out")


def test_a_cell_that_was_never_published_is_refused(registry, tmp_path):
    with pytest.raises(RegistryError, match="nothing was ever published"):
        registry.fetch(KEY, tmp_path / "out")
    registry.publish(KEY, adapter(tmp_path / "a"))
    with pytest.raises(RegistryError, match=r"cell x\.y\.1 .* not among the 1 published"):
        registry.fetch("x.y.1", tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"k": 1}',
        '{"k": {"sha256": "../../etc", "files": {}, "extra": {}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_lock_file_is_refused(registry, tmp_path, text):
    registry.publish(KEY, adapter(tmp_path / "a"))
    registry.lock_file.write_text(text)
    with pytest.raises(RegistryError, match=r"lock\.json is damaged"):
        registry.fetch(KEY, tmp_path / "out")
    with pytest.raises(RegistryError, match=r"lock\.json is damaged"):
        registry.publish(KEY, tmp_path / "a")


def test_an_incomplete_adapter_is_not_published(registry, tmp_path):
    folder = adapter(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        registry.publish(KEY, folder)
    assert not registry.lock_file.exists()


def test_two_writing_processes_lose_nothing(registry, tmp_path):
    code = (
        "import sys; from pathlib import Path;"
        "from persona_assets_tests.training.test_registry import *;"
        "root, name = Path(sys.argv[1]), sys.argv[2];"
        "registry = FolderRegistry(root / 'registry');"
        "[registry.publish(f'{name}.arm.{i}', adapter(root / name / str(i), f'{i % 5}'))"
        " for i in range(30)]"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in ("a", "b")
    ]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    entries = registry.entries()
    assert set(entries) == {f"{name}.arm.{i}" for name in ("a", "b") for i in range(30)}
    assert len({entry["sha256"] for entry in entries.values()}) == 5
    for key in entries:
        registry.fetch(key, tmp_path / "out" / key)
    assert not list(registry.root.glob(".draft-*"))
