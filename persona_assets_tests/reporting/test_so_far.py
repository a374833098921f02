"""The page of what has landed so far: what it says, and that it cannot be taken for the report."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from persona_assets.audit import audit
from persona_assets.freshness import Freshness
from persona_assets.reporting.so_far import SoFar, render_html, render_markdown, so_far
from persona_assets.store import Ref
from persona_assets_tests.fabricated import Fabricated
from persona_assets_tests.integration.project import tiny_study_text
from persona_assets_tests.reporting.test_policy import policy_of

LOST, FAILED = "librarian.garbage_cot.42", "comedian.contradicting_cot.42"
HOSTILE = "<img src=x onerror=alert(1)>|`\x1b[31m"


def look(project: Fabricated) -> SoFar:
    return so_far(Freshness(project.graph, project.store))


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Fabricated:
    """All has landed, then one cell's outcomes went, and another's turned out wrong."""
    data = tmp_path_factory.mktemp("so_far") / "data"
    (data / "studies").mkdir(parents=True)
    (data / "studies" / "tiny.yaml").write_text(tiny_study_text(), "utf-8")
    return Fabricated(data)


@pytest.fixture(scope="module")
def complete(project) -> SoFar:
    project.land_all()
    return look(project)


@pytest.fixture(scope="module")
def half(project, complete) -> SoFar:
    project.remove(Ref("cell_outcomes", LOST))
    wrong = audit("coverage", False, observed="1 row", threshold="2 rows", remedy="mend")
    project.land(Ref("cell_outcomes", FAILED), audits=[wrong])
    (cut,) = project.store.folder(Ref("checkpoint", LOST)).glob("*/file")
    cut.write_text("x")
    return look(project)


def rows(html: str) -> list[list[str]]:
    """The text of every table row's cells."""
    found = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    cells = (re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL) for row in found)
    return [[" ".join(re.sub(r"<[^>]*>", " ", cell).split()) for cell in row] for row in cells]


def test_a_half_landed_study(half):
    assert not half.complete
    assert half.counts == {
        "prior_checkpoint": (5, 5),
        "training_dataset": (12, 12),
        "checkpoint": (11, 12),
        "cell_outcomes": (10, 12),
        "cell_diagnostics": (10, 12),
        "contrast_estimate": (2, 8),
    }
    states = {row.key: row.states for row in half.cells}
    assert states[LOST] == {
        "training_dataset": "fresh",
        "checkpoint": "missing",
        "cell_outcomes": "missing",
        "cell_diagnostics": "stale",
    }
    assert states[FAILED]["cell_outcomes"] == "failed"
    assert {row.key for row in half.cells if not row.accuracy} == {LOST, FAILED}
    waits = {f"{e.a}-{e.b}": e.missing for e in half.estimates if e.values is None}
    assert waits == {
        "generic_cot-garbage_cot": (LOST,),
        "persona_cot-garbage_cot": (LOST,),
        "contradicting_cot-generic_cot": (FAILED,),
    }
    assert [e.values for e in half.estimates if e.values] == [(0.125, 0.0625, 0.1875)] * 2


def test_trouble_is_what_is_wrong_in_itself(half):
    damaged, failed = half.trouble
    assert damaged.startswith(f"checkpoint[{LOST}] is damaged: checkpoint/{LOST}/")
    assert failed == f"cell_outcomes[{FAILED}] failed its blocking checks: coverage"


def test_the_html_says_so_and_is_marked_incomplete(half):
    html = render_html(half)
    assert "<title>INCOMPLETE: " in html
    assert "so far: INCOMPLETE</span></h1>" in html
    assert "not the report" in html
    table = rows(html)
    accuracy = ["0.250"] * 4
    assert ["untrained model", "", "", "", "", "", *accuracy] in table
    assert [LOST, "", "✓", "○", "○", "stale", *["–"] * 4] in table
    assert [FAILED, "", "✓", "✓", "FAILED", "stale", *["–"] * 4] in table
    assert ["librarian.persona_cot.42", *"✓✓✓✓✓", *accuracy] in table
    estimated = "generic_cot − scrambled_english_cot source loss"
    assert ["H1", estimated, "+0.125", "[+0.062, +0.188]"] in table
    assert ["H2", "persona_cot − garbage_cot source loss", f"waits for 1 {LOST}"] in table


def test_the_html_asks_for_nothing_from_elsewhere(half):
    html = render_html(half)
    assert "default-src 'none'" in policy_of(html)
    assert not re.findall(r"<script|<link|<iframe|url\(|https?:", html)
    assert "prefers-color-scheme: dark" in html


def test_a_complete_page_says_so_and_links_to_the_report(complete, project):
    assert complete.complete
    assert complete.trouble == ()
    version = project.store.landed(Ref("report")).version
    html = render_html(complete)
    assert "<title>Complete: " in html
    assert "INCOMPLETE" not in html
    # From store/<study>/so_far/<version>/so_far.html.
    assert f'href="../../report/{version}/report.html"' in html
    text = render_markdown(complete)
    assert "[the report](/assets/tiny/report)" in text
    assert "INCOMPLETE" not in text


def test_the_markdown_is_the_same_page(half):
    tokens = MarkdownIt("commonmark").enable("table").parse(render_markdown(half))
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == 2
    texts = [token.content for token in tokens if token.type == "inline"]
    assert texts[0] == "INCOMPLETE: Miniature persona-leakage study, so far"
    assert "`cell_outcomes`: 10 of 12" in texts
    assert kinds.count("tr_open") == (1 + 8) + (1 + 1 + 12)
    place = texts.index(f"`{LOST}`")
    assert texts[place : place + 10] == [f"`{LOST}`", "", "✓", "○", "○", "stale", *["–"] * 4]


def test_what_others_wrote_is_escaped(half):
    (row, *others), estimate = half.cells, half.estimates[0]
    hostile = replace(
        half,
        title=HOSTILE,
        cells=(replace(row, key=HOSTILE), *others),
        estimates=(replace(estimate, values=None, missing=(), note=HOSTILE),),
        trouble=(HOSTILE,),
    )
    html, text = render_html(hostile), render_markdown(hostile)
    assert "<img" not in html
    assert html.count("&lt;img src=x") == 5
    rendered = MarkdownIt("commonmark").enable("table").render(text)
    assert "<img" not in rendered
    assert "\x1b" not in html + text


def test_many_missing_cells_are_folded_away(half):
    names = tuple(f"cell{i}" for i in range(24))
    many = replace(half, estimates=(replace(half.estimates[0], values=None, missing=names),))
    html = render_html(many)
    assert "<details><summary>waits for 24</summary>" in html
    assert all(f"<code>{name}</code>" in html for name in names)
    troubled = replace(half, trouble=tuple(f"trouble {i}" for i in range(25)))
    assert "and 5 more" in render_html(troubled)
    assert "trouble 20" not in render_html(troubled)


def test_a_page_is_made_from_what_it_says(half, complete, project):
    assert half.inputs == look(project).inputs
    assert half.inputs != complete.inputs
    first, second, *others = half.cells
    again = replace(half, cells=(first, replace(second, version="other"), *others))
    assert again.inputs["upstream"] == half.inputs["upstream"] | {second.key: "other"}


def test_a_damaged_estimate_is_told_and_not_shown(complete, project, tmp_path):
    ref = Ref("contrast_estimate", "generic_cot-scrambled_english_cot.source_loss")
    (path,) = project.store.folder(ref).glob("*/estimates.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    (estimate,) = (e for e in look(project).estimates if f"{e.a}-{e.b}.{e.axis}" == ref.key)
    path.write_bytes(whole)
    assert estimate.values is None
    assert "has SHA-256" in estimate.note
