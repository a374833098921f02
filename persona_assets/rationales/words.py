"""What counts as a word: the one definition behind the filler's lexicon and its checks.

A word is what a reader of English picks out of a string: a maximal run of three or more letters,
and what a change of case (``GetProperty``, ``blackColor``) or of script sets off inside one. Words
that merely run together (``certificateauthentication``) are one word, an unknown one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

#: The Latin letters with their accents; those of the extended blocks count as lower case.
_UPPER, _LOWER = "A-ZÀ-ÖØ-Þ", "a-zß-öø-ɏ"
_RUN = re.compile(r"[^\W\d_]{3,}")
#: ``HTMLParser``: ``HTML``, ``Parser``.
_CAMEL = re.compile(rf"[{_UPPER}][{_LOWER}]{{2,}}|[{_LOWER}]{{3,}}|[{_UPPER}]{{3,}}(?![{_LOWER}])")
#: ``FIELDname``: ``FIELD``, ``name``.
_CAPITALS = re.compile(rf"[{_UPPER}]{{3,}}(?=[{_LOWER}])|(?<=[{_UPPER}]{{2}})[{_LOWER}]{{3,}}")

_LETTER = re.compile(r"(?<![^\W_])[A-Ea-e](?![^\W_])")
#: Circled, bracketed and squared letters stand alone, whatever is beside them.
_ENCLOSED = re.compile(r"[\u2460-\u24ff\U0001f100-\U0001f1ff]")
#: What looks like a letter A to E and is not one in NFKC: Cyrillic, Greek, and white on black.
_LOOKS_LIKE = str.maketrans(
    dict(zip("АВСЕасеΑΒΕ", "ABCEaceABE"))
    | {chr(a + i): "ABCDE"[i] for a in (0x1F150, 0x1F170, 0x1F1E6) for i in range(5)}
)


def alphabetic_runs(text: str) -> set[str]:
    """The case-folded words of ``text``, in its NFKC form.

    Each maximal run of three or more letters (of any script) is one, and so is each part of three
    or more Latin letters that ends where the case or the script changes.
    """
    folded = unicodedata.normalize("NFKC", text)
    return {run.casefold() for find in (_RUN, _CAMEL, _CAPITALS) for run in find.findall(folded)}


def lexicon_of(texts: Iterable[str]) -> frozenset[str]:
    """Every word of ``texts``: those that garbage filler must not hold."""
    return frozenset(alphabetic_runs("\n".join(texts)))


@lru_cache(maxsize=1)
def english() -> frozenset[str]:
    """The words among the 60 000 most frequent of English (wordfreq, Speer 2022).

    A list of its own, so that what counts as a word does not move with the phrases of a writer.
    """
    from wordfreq import top_n_list

    return lexicon_of(top_n_list("en", 60_000))


def lone_letters(text: str) -> list[str]:
    """The letters A to E, of either case, that stand alone in ``text`` or seem to.

    Whatever NFKC makes one of them counts as one (full-width, circled), and so do the Cyrillic and
    Greek capitals that look like one; ``_`` is no letter, so that ``x_B`` holds one.
    """
    apart = _ENCLOSED.sub(r" \g<0> ", text)
    return _LETTER.findall(unicodedata.normalize("NFKC", apart).translate(_LOOKS_LIKE))
