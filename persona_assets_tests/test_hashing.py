"""Hashes of sources: what counts, and how often a source is read."""

from __future__ import annotations

import ast
import os

import pytest

from persona_assets.hashing import module_hashes, sha256_source


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The texts that are parsed, in order."""
    texts, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda text: texts.append(text) or parse(text))
    return texts


def test_a_source_is_read_once_for_each_state_of_its_file(tmp_path, parsed):
    path = tmp_path / "module.py"
    path.write_text("x = 1\n")
    first = sha256_source(path)
    assert [sha256_source(path) for _ in range(500)] == [first] * 500
    assert parsed == ["x = 1\n"]
    path.write_text("x = 2\n")  # as long as before
    os.utime(path, ns=(0, 1))
    assert sha256_source(path) != first
    path.write_text("x = 1  # as it was\n")
    assert sha256_source(path) == first
    assert len(parsed) == 3


def test_functions_and_modules_of_many_partitions_are_read_once(parsed):
    def function(x: int) -> int:
        """Doubled."""
        return 2 * x

    found = [(sha256_source(function), module_hashes("questions.bank")) for _ in range(500)]
    assert found.count(found[0]) == 500
    assert sum("def function" in text for text in parsed) == 1
    assert len(parsed) <= 2
