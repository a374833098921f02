"""One landed synthetic study, whose rationales are hostile, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_assets.reporting.figures import forest_plot, loss_heatmap
from persona_assets.reporting.report import Report, render_report
from persona_assets.reporting.vocabulary_figure import vocabulary_plot
from persona_assets_tests.synthetic import Landed, bank, land, small_study

#: HTML, a table's delimiter, a fence, Markdown links, a terminal escape, a bidirectional override.
HOSTILE = (
    "<script>alert('own')</script> | a `tick` and\n````\n</pre><img src=x onerror=alert(1)>\n"
    "[click](javascript:alert(1)) \x1b[31mred\x1b[0m \u202eevil &lt; **bold** {{ 7 * 7 }}"
)


@pytest.fixture(scope="session")
def landed(tmp_path_factory: pytest.TempPathFactory) -> Landed:
    return land(tmp_path_factory.mktemp("landed"), small_study(), bank(12), rationale=HOSTILE)


@pytest.fixture(scope="session")
def warehouse(landed: Landed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("warehouse") / "warehouse.duckdb"
    landed.build(target)
    return target


@pytest.fixture(scope="session")
def figures(landed: Landed) -> dict[str, bytes]:
    return {
        "forest_plot": forest_plot(landed.frames["contrasts"], landed.study),
        "loss_heatmap": loss_heatmap(landed.frames["losses"], landed.study),
        "vocabulary": vocabulary_plot(landed.frames["more"]["vocabulary"], landed.study),
    }


@pytest.fixture(scope="session")
def report(landed: Landed, warehouse: Path, figures: dict[str, bytes]) -> Report:
    return render_report(warehouse, landed.study, figures)
