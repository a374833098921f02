"""Numbers on the page: each names the ledger's row that it is, and how it was rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup, escape

from persona_assets.reporting import words
from persona_assets.reporting.ledger import Ledger, Number

#: How a field of a number may be written; ``p`` besides, which needs the family-wise level.
STYLES: dict[str, Callable[[Any], str]] = {
    "signed": words.signed,
    "signed4": partial(words.signed, digits=4),
    "error": "{:.4f}".format,
    "spread": "{:.3f}".format,
    "share": "{:.3f}".format,
    "ratio": "{:.2f}".format,
    "tokens": "{:.1f}".format,
    "count": lambda value: words.count(_whole(value)),
    "percent": words.percent,
    "hours": lambda seconds: f"{seconds / 3600:.3g}",
    "repr": repr,
    "text": str,
}
#: Fields of a number that may be printed.
FIELDS = (
    *("value", "ci_low", "ci_high", "confidence", "std_error", "p_value", "p_holm"),
    *("n", "unit", "formula"),
)


def written(number: Number, field: str, style: str, alpha: float) -> str:
    """A field of a number as the page has it; a dash where there is none.

    Raises:
        KeyError: no such style.
        ValueError: a count that is not whole.
    """
    value = getattr(number, field)
    if style == "p":
        return words.p_text(value, alpha)
    return "–" if value is None else STYLES[style](value)


@dataclass(frozen=True, slots=True)
class Printed:
    """One field of one number, where it is printed."""

    number: Number
    field: str
    style: str


#: A sentence: what is said, and the numbers in it.
Sentence = Sequence[str | Printed]


class Page:
    """Writes numbers, and keeps which ones a page printed, in order of first use."""

    def __init__(self, ledger: Ledger, alpha: float):
        self._ledger, self._alpha = ledger, alpha
        self._used: dict[str, Number] = {}
        self._sets: dict[tuple[str, ...], str] = {}

    @property
    def used(self) -> list[Number]:
        """The numbers printed so far."""
        return list(self._used.values())

    @property
    def cell_sets(self) -> dict[str, tuple[str, ...]]:
        """The sets of cells that were named, by name."""
        return {name: cells for cells, name in self._sets.items()}

    def cell_set(self, number: Number) -> str:
        """A name for a number's cells: many numbers are made from the same."""
        return self._sets.setdefault(number.cells, str(len(self._sets)))

    def number(self, number_id: str, field: str = "value", style: str = "signed") -> Printed:
        """A number to print.

        Raises:
            UnknownNumber: the ledger has none of that id.
        """
        return Printed(self._ledger[number_id], field, style)

    def maybe(self, number_id: str, field: str = "value", style: str = "signed") -> Printed | str:
        """A number to print, a dash where it is not defined and the ledger leaves it out."""
        return self.number(number_id, field, style) if number_id in self._ledger else "–"

    def text(self, printed: Printed) -> str:
        """A number as plain text; kept."""
        self._used.setdefault(printed.number.number_id, printed.number)
        return written(printed.number, printed.field, printed.style, self._alpha)

    def link(self, printed: Printed) -> Markup:
        """A number as a link to its row in the appendix; kept."""
        number_id = escape(printed.number.number_id)
        return Markup(
            '<a class="num" href="#n-{0}" data-number="{0}" data-field="{1}" data-style="{2}">'
            "{3}</a>"
        ).format(number_id, printed.field, printed.style, self.text(printed))


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"{value!r} is no count")
    return int(value)
