"""Hashes of sources: what counts, and how often a source is read."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import pytest

from persona_assets.hashing import module_hashes, sha256_source


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The texts that are read of files and functions, in order."""
    texts: list[str] = []
    for owner, name in ((Path, "read_text"), (inspect, "getsource")):
        reads = getattr(owner, name)

        def noted(*args, reads=reads):
            texts.append(reads(*args))
            return texts[-1]

        monkeypatch.setattr(owner, name, noted)
    return texts


def test_a_source_is_read_once_for_each_state_of_its_file(tmp_path, read):
    path = tmp_path / "module.py"
    path.write_text("x = 1\n")
    first = sha256_source(path)
    assert [sha256_source(path) for _ in range(500)] == [first] * 500
    assert read == ["x = 1\n"]
    path.write_text("x = 2\n")  # as long as before
    os.utime(path, ns=(0, 1))
    assert sha256_source(path) != first
    path.write_text("x = 1  # as it was\n")
    assert sha256_source(path) == first
    assert len(read) == 3


def test_what_many_partitions_are_made_by_is_read_once(read):
    def function(x: int) -> int:
        """Doubled."""
        return 2 * x

    found = [(sha256_source(function), module_hashes("questions.bank")) for _ in range(500)]
    assert found.count(found[0]) == 500
    assert sum("def function" in text for text in read) == 1
    assert len(read) <= 2  # the module may have been read before
