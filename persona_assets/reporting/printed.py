"""Numbers and quotations on the page: each names what it is of, and how it was rounded.

A number is the ledger's (:class:`Printed`) or the study file's (:class:`Stated`); a text that may
hold digits is quoted from the warehouse (:class:`Quoted`). What names its origin can be checked:
see :mod:`persona_assets.reporting.lint`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup, escape

from persona_assets.reporting import words
from persona_assets.reporting.ledger import Ledger, Number
from persona_assets.study import Study

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
    "plain": "{:g}".format,
    "short": "{:.2g}".format,
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


@dataclass(frozen=True, slots=True)
class Stated:
    """A value of the study file or of its grid, where it is printed.

    Attributes:
        path: A key of :class:`StudyValues`.
    """

    path: str
    value: float
    style: str

    @property
    def text(self) -> str:
        """The value as the page has it."""
        return STYLES[self.style](self.value)


@dataclass(frozen=True, slots=True)
class Quoted:
    """A value of one row of the warehouse, word for word.

    Attributes:
        text: The value; None is shown as ``instead``.
        table, column: Where it stands.
        key: Column → value: which row.
    """

    text: object
    table: str
    column: str
    key: Mapping[str, str]
    instead: str = "–"

    @property
    def shown(self) -> str:
        """The value as the page has it."""
        return self.instead if self.text in (None, "") else str(self.text)


@dataclass(frozen=True, slots=True)
class Code:
    """A name or a definition: its digits are none of the study's numbers."""

    text: str


#: A sentence: what is said, and the numbers and quotations in it.
Part = str | Printed | Stated | Quoted | Code
#: The parts that name where they are from.
MARKED = (Printed, Stated, Quoted, Code)
Sentence = Sequence[Part]


class StudyValues(Mapping[str, float]):
    """The numbers that a study states, by path: every number of its file, and of its grid.

    Paths are the file's (``training.rank``, ``contrasts.3.equivalence.0.margin``); what follows
    from the file is below ``grid``.
    """

    def __init__(self, study: Study):
        self._values = dict(_leaves(study.content)) | {
            f"grid.{name}": float(value) for name, value in _grid(study).items()
        }

    def say(self, path: str, style: str = "plain") -> Stated:
        """A value to print.

        Raises:
            KeyError: the study states no such number.
        """
        return Stated(path, self[path], style)

    def __getitem__(self, path: str) -> float:
        return self._values[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON value, by its path."""
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        yield path.removeprefix("."), float(value)
    elif isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _leaves(item, f"{path}.{key}")


def _grid(study: Study) -> dict[str, float]:
    """What follows from a study file: counts of its grid, levels of its tests."""
    arms = dict.fromkeys(cell.arm for cell in study.cells)
    tests = [test for contrast in study.contrast_list for test in contrast.equivalence]
    return {
        "cells": len(study.cells),
        "trained": len(study.cells_of("trained")),
        "carry_over": len(study.cells_of("carry_over")),
        **{f"arm.{arm}": sum(cell.arm == arm for cell in study.cells) for arm in arms},
        "personas": len(study.personas),
        "bystanders": len(study.personas) - 1,
        "scaffolds": len(study.scaffolds),
        "contrasts": len(study.contrast_list),
        "least_p": 1 / (1 + study.inference.resamples),
        **{f"level.{test.alpha:g}": 1 - 2 * test.alpha for test in tests},
    }


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

    def text(self, part: Part) -> str:
        """A part of a sentence as plain text; a number of the ledger is kept."""
        match part:
            case Printed(number, field, style):
                self._used.setdefault(number.number_id, number)
                return written(number, field, style, self._alpha)
            case Stated():
                return part.text
            case Quoted():
                return part.shown
            case Code(text):
                return text
        return part

    def marked(self, part: Printed | Stated | Quoted | Code) -> Markup:
        """A number as a link to its row in the appendix, or what names its place in the study
        file or the warehouse."""
        text = words.visible(self.text(part))
        match part:
            case Printed(number, field, style):
                return Markup(
                    '<a class="num" href="#n-{0}" data-number="{0}" data-field="{1}" '
                    'data-style="{2}">{3}</a>'
                ).format(escape(number.number_id), field, style, text)
            case Stated(path, _, style):
                return Markup('<span data-study="{}" data-style="{}">{}</span>').format(
                    path, style, text
                )
            case Quoted():
                return Markup("<span{}>{}</span>").format(attributes(part), text)
        return Markup("<code>{}</code>").format(text)


def attributes(quoted: Quoted) -> Markup:
    """The attributes by which an element says what it quotes."""
    named = {"table": quoted.table, "column": quoted.column, **quoted.key}
    return Markup("").join(
        Markup(' data-{}="{}"').format(name.replace("_", "-"), value)
        for name, value in named.items()
    )


def _whole(value: float) -> int:
    if value != int(value):
        raise ValueError(f"{value!r} is no count")
    return int(value)
