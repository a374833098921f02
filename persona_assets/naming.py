"""Names in sentences: several of them, and one that nothing has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'? `` (with a space after it), or nothing if no name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def unknown(name: str, known: Iterable[str], what: str, study: str) -> str:
    """That a study has no such thing, and which is the nearest."""
    return f"study {study} has no {what} {name!r}. {nearest(name, known)}".strip()


def listed(items: Sequence[object]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)
