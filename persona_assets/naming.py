"""What to say of a name that nothing has: the nearest that something has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'? `` (with a space after it), or nothing if no name is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}? " if close else ""


def unknown(name: str, known: Iterable[str], what: str, study: str) -> str:
    """That a study has no such thing, and which is the nearest."""
    return f"study {study} has no {what} {name!r}. {nearest(name, known)}".strip()
