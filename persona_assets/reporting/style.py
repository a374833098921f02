"""How every figure looks, and how it becomes SVG bytes that are equal for equal numbers.

Colours are Okabe & Ito's, told apart with any colour vision, and never the only cue. Backgrounds
are white and text is drawn as paths: a figure looks the same wherever it is shown.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from persona_assets.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, LINE = "#1a1a1a", "#5c5c5c", "#b8b8b8"
_MARKERS = "osD^vPX*<>hp"
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
STYLE = {
    "figure.facecolor": "white",
    "svg.hashsalt": "persona_assets",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "xtick.color": MUTED,
    "ytick.color": INK,
}


def source_markers(study: Study) -> Iterator[tuple[str, str]]:
    """Each source with its marker; past the twelfth they come round again."""
    return zip(study.sources, itertools.cycle(_MARKERS), strict=False)


def svg_of(figure: Figure) -> bytes:
    """The figure's SVG without the date or version that would make equal figures differ."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    return buffer.getvalue()
