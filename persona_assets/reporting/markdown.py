"""Text made harmless for Markdown (CommonMark and GitHub's tables)."""

from __future__ import annotations

import base64
import re
from typing import Any

from markupsafe import Markup

from persona_assets.reporting.words import visible

#: Around what names its origin, and around code, until :func:`unmarked` takes them away. Text
#: cannot hold them: ``words.visible`` shows such characters by their numbers.
MARK, CODE, END = "\ue000", "\ue001", "\ue002"

_ACTIVE = re.compile(r"([\\`*_\[\]|~#!$<>&])")


def inline(value: Any) -> str:
    """A value as inline text: nothing in it is markup, HTML or a new line.

    What the other functions here return is passed through.
    """
    if isinstance(value, Markup):
        return value
    return Markup(_ACTIVE.sub(r"\\\1", _one_line(value)))


def plain(text: str) -> str:
    """What :func:`inline` was given, but for white space."""
    return re.sub(rf"\\{_ACTIVE.pattern}", r"\1", text)


def code(value: Any) -> Markup:
    """A name as a code span of a table's cell; delimited by more backticks than it holds.

    A bar is escaped, as a table needs it even within code.
    """
    text = _one_line(value).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    pad = " " if "`" in text else ""
    return Markup(f"{ticks}{pad}{text}{pad}{ticks}")


def fence(value: Any) -> Markup:
    """A text as a fenced block, kept line for line; the fence is longer than any it holds."""
    text = visible(str(value))
    ticks = "`" * max(3, _longest_run(text) + 1)
    return Markup(f"{ticks}text\n{text}\n{ticks}")


def marked(text: str) -> Markup:
    """Rendered text that names its origin, or is quoted from the warehouse."""
    return Markup(f"{MARK}{text}{END}")


def unmarked(markdown: str) -> str:
    """Markdown without the marks."""
    return re.sub(f"[{MARK}{CODE}{END}]", "", markdown)


def data_uri(svg: bytes) -> str:
    """An SVG as a URI that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def picture(svg: bytes) -> Markup:
    """An SVG as an image in place."""
    return Markup(f"![plot]({data_uri(svg)})")


def _one_line(value: Any) -> str:
    return re.sub(r"[ \t\n]+", " ", visible(str(value)))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
