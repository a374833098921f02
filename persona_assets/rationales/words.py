"""What counts as a word: the one definition behind the filler's lexicon and its checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_RUN = re.compile(r"[^\W\d_]{3,}")
_LETTER = re.compile(r"(?<!\w)[A-Ea-e](?!\w)")


def alphabetic_runs(text: str) -> set[str]:
    """The case-folded maximal runs of three or more letters (of any script) in ``text``."""
    return {run.casefold() for run in _RUN.findall(text)}


def lexicon_of(texts: Iterable[str]) -> frozenset[str]:
    """Every alphabetic run of ``texts``: the words that garbage filler must not hold."""
    return frozenset(alphabetic_runs("\n".join(texts)))


@lru_cache(maxsize=1)
def english() -> frozenset[str]:
    """The alphabetic runs of the 60 000 most frequent English words (wordfreq, Speer 2022).

    A list of its own, so that what counts as a word does not move with the phrases of a writer.
    """
    from wordfreq import top_n_list

    return lexicon_of(top_n_list("en", 60_000))


def lone_letters(text: str) -> list[str]:
    """The letters A to E, of either case, that stand alone in ``text``."""
    return _LETTER.findall(text)
