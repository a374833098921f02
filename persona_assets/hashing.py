"""Content hashes: the one way this package names a thing by what is in it."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any


def sha256_text(text: str) -> str:
    """Hex SHA-256 of ``text`` in UTF-8 (64 characters)."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of ``value`` as canonical JSON (sorted keys, no spaces, no NaN).

    Raises:
        TypeError, ValueError: ``value`` is not representable as strict JSON.
    """
    return sha256_text(
        json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
    )


def as_json(value: Any) -> Any:
    """``value`` as it comes back from JSON: tuples as lists, keys as strings."""
    return json.loads(json.dumps(value, allow_nan=False))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_lines(lines: Iterable[str]) -> str:
    """Hex SHA-256 over an ordered sequence of strings, each ended by a newline."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def sha256_source(thing: Callable | Path) -> str:
    """Hash of what a function, a class or a Python file does: its syntax tree less docstrings.

    Comments, formatting and docstrings do not count, so that tidying up stales nothing.
    """
    file = (thing if isinstance(thing, Path) else Path(inspect.getfile(thing))).stat()
    return _sha256_source(thing, file.st_mtime_ns, file.st_size)


@lru_cache(maxsize=512)
def _sha256_source(thing: Callable | Path, mtime_ns: int, size: int) -> str:
    """Once for each state of its file: every partition of a study asks for the same few."""
    text = thing.read_text("utf-8") if isinstance(thing, Path) else inspect.getsource(thing)
    tree = ast.parse(textwrap.dedent(text))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return sha256_text(ast.dump(tree))


def module_hashes(*names: str) -> dict[str, str]:
    """:func:`sha256_source` of this package's modules, by path, without importing them.

    ``names`` are relative to the package: ``rationales.garbage``.
    """
    package = Path(__file__).parent
    paths = [package.joinpath(*name.split(".")).with_suffix(".py") for name in names]
    return {str(path.relative_to(package)): sha256_source(path) for path in paths}
