"""How the report writes numbers and names, in HTML, Markdown and figures alike."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

AXIS_WORDS = {"source_loss": "source loss", "bystander_leakage": "bystander leakage"}
ORIGIN_WORDS = {"trained": "trained here", "carry_over": "carried over"}


def signed(value: float, digits: int = 3) -> str:
    """A signed number with a true minus sign; what rounds to zero bears no sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def p_text(p: float | None, alpha: float) -> str:
    """A p-value: four decimals, ``< 0.0001`` below that, a dash where there is none.

    As many more decimals as it takes for the printed number to stand on the same side of
    ``alpha`` as ``p`` itself.
    """
    if p is None:
        return "–"
    if p < 0.0001 <= alpha:
        return "< 0.0001"
    texts = (f"{p:.{digits}f}" for digits in range(4, 18))
    return next((t for t in texts if (float(t) <= alpha) == (p <= alpha)), repr(p))


def count(n: int) -> str:
    """A count, its thousands set apart by no-break spaces."""
    return f"{n:,}".replace(",", "\N{NO-BREAK SPACE}")


def percent(share: float) -> str:
    """A confidence level or share, without idle decimals: ``95 %``, ``99.5 %``."""
    return f"{100 * share:.4g}\N{NO-BREAK SPACE}%"


def visible(text: str) -> str:
    """Text without a character that acts: controls and invisible marks are shown, not obeyed.

    Model output may hold terminal escapes, or marks that reverse the reading order. Line breaks
    and tabs are kept.
    """
    return "".join(character if character in "\n\t" else _shown(character) for character in text)


def _shown(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return f"\\u{{{ord(character):x}}}"


def table_value(value: object) -> str:
    """A value of a table whose columns are not known beforehand."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def text_table(
    names: Sequence[str], rows: Sequence[Sequence[object]], *, exact: bool = False
) -> str:
    """Rows under their column names, for a terminal: one line a row, columns aligned.

    Numbers have four digits, or all of them if ``exact``. Values may be model output: line breaks
    and whatever acts on a terminal are shown, not obeyed.
    """
    lines = [
        [_terminal(name) for name in names],
        *(
            [_terminal(repr(v) if exact and isinstance(v, float) else table_value(v)) for v in row]
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(f"{text:<{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _terminal(text: str, longest: int = 80) -> str:
    line = " ".join(visible(text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"
