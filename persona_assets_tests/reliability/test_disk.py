"""A sample of the disks that refuse, and that a loss on them is noticed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from persona_assets import store as store_module
from persona_assets.store import Ref
from persona_assets_tests.reliability import small_disk as disks
from persona_assets_tests.reliability.bench import bench
from persona_assets_tests.reliability.disk import trial, tried
from persona_assets_tests.reliability.small_disk import small_disk

CELL = "librarian.garbage_cot.42"
DATASET, TOKENIZER = Ref("training_dataset", CELL), Ref("tokenizer")


def test_a_sample_loses_nothing(project, tmp_path):
    kinds = {"training_dataset": ("a dataset", 1), "warehouse": ("the warehouse", 1)}
    refused = ("training_dataset",)
    found = tried(project.data, tmp_path, 7, kinds, refused, databases=1, clock=False)
    assert [fault for row in found for fault in row.faults] == []
    assert [row.tried for row in found][:3] == [1, 1, 1]
    before_work, read_only, forbidden = found[3:]
    mounted = "tmpfs" in found[0].fault
    assert (before_work.tried, read_only.tried) == ((6, 6) if mounted else (2, 0))
    assert forbidden.tried == 1


def test_without_a_mount_the_size_of_files_is_limited(project, tmp_path, monkeypatch):
    monkeypatch.setattr(disks, "_MOUNT", "false")
    with small_disk(tmp_path / "disk") as disk:
        assert not disk.mounted
        shutil.copytree(project.data, disk.folder / "data")
        with bench(disk.folder / "data") as on:
            assert trial(on, DATASET, partial(disk.full, 4096)) is None
            on.remove(DATASET)
            with disk.full(4096):
                assert on.make(DATASET).status == "failed"


@contextmanager
def _cut(path: Path) -> Iterator[None]:
    """A fault that damages what had landed."""
    path.write_bytes(path.read_bytes()[:-1])
    yield


@contextmanager
def _leave(folder: Path) -> Iterator[None]:
    """A fault that leaves a file behind."""
    folder.mkdir()
    (folder / ".left").touch()
    yield


def test_what_goes_wrong_is_noticed(project, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk") as disk:
        shutil.copytree(project.data, disk.folder / "data")
        with bench(disk.folder / "data", tmp_path / "dagster") as on:
            full = partial(disk.full, 8192)
            assert "it does not say 'what it needs'" in trial(on, DATASET, full, "what it needs")
            assert "made all the same" in trial(on, DATASET, nullcontext, "anything")
            assert "left behind: " in trial(on, DATASET, partial(_leave, on.store.folder(DATASET)))
            with monkeypatch.context() as patched:
                patched.setattr(store_module, "refusal", lambda error, path: "cannot")
                assert "no clear error" in trial(on, DATASET, full)
            with monkeypatch.context() as patched:
                patched.setattr(type(on), "content", lambda *_: object())
                assert "made afterwards with another content" in trial(on, DATASET, full)
            found = trial(on, DATASET, partial(_cut, on.store.path(TOKENIZER, "tokenizer.json")))
            assert "no longer as landed: tokenizer" in found
            assert "not made afterwards" in found
