"""The report's checks: the page as rendered passes, and every spoiled page is caught."""

from __future__ import annotations

import re
from html import escape

import pytest

from persona_assets.reporting import queries
from persona_assets.reporting.lint import (
    Page,
    lint_audits,
    lint_numbers,
    lint_structure,
    study_values,
)
from persona_assets.reporting.prose import forest_caption, methods, threats
from persona_assets.reporting.trace import read_ledger
from persona_assets.study import load_study
from persona_assets_tests.synthetic import MINI

MACRO = "contrast/persona_cot-garbage_cot/persona_cot/source_loss/macro/question"


@pytest.fixture(scope="module")
def lint(landed, warehouse):
    """Violations of a page: of its numbers, and of its structure."""
    with queries.open_warehouse(warehouse) as db:
        ledger = read_ledger(db)

        def checked(source: str) -> tuple[list[str], list[str]]:
            page = Page(source)
            return (
                lint_numbers(page, ledger, landed.study),
                lint_structure(page, db, ledger, landed.study),
            )

        yield checked


def spoiled(source: str, old: str, new: str) -> str:
    """The page with the first ``old`` replaced."""
    assert old in source, old
    return source.replace(old, new, 1)


def test_the_rendered_page_passes(report, warehouse, landed):
    found = lint_audits(report.html, warehouse, landed.study)
    assert {audit.name: audit.status for audit in found} == {
        "numbers_in_ledger": "passed",
        "report_structure": "passed",
    }


def test_a_spoiled_page_fails_both_audits(report, warehouse, landed):
    page = spoiled(report.html, "<h2>Findings</h2>", "<p>0.777</p>")
    numbers, structure = lint_audits(page, warehouse, landed.study)
    assert (numbers.status, structure.status) == ("failed", "failed")
    assert "0.777 is in neither ledger nor study file" in numbers.details["violations"][0]
    assert structure.details["violations"] == ["section findings has 0 headings, not one"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("The effect is 0.212.", "0.212 is in neither"),
        ("It fell by −0.017 (p < 0.0001).", "−0.017 is in neither"),
        ("14\u00a0064 pairs", "14\u00a0064 is in neither"),
        ("98\u00a0% of them", "98\u00a0% is in neither"),
        ("an effect of 17pp", "17pp is in neither"),
        ("version 3.14.15", "3.14 is in neither"),
        ("a share of .37", ".37 is in neither"),
    ],
)
def test_a_typed_number_is_caught(lint, report, typed, said):
    numbers, _ = lint(spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2><p>{typed}</p>"))
    assert any(said in sentence for sentence in numbers), numbers


@pytest.mark.parametrize(
    "typed",
    ["seed 137", "the 95\u00a0% interval", "24 cells of 5 personas", "over 2\u00a0000 resamples"],
)
def test_what_study_file_and_grid_say_may_be_typed(lint, report, typed):
    numbers, _ = lint(spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2><p>{typed}</p>"))
    assert numbers == []


def anchor(report, number_id: str, field: str) -> re.Match[str]:
    """The first place where a number is printed."""
    pattern = (
        rf'<a class="num" [^>]*data-number="{number_id}" data-field="{field}"[^>]*>([^<]*)</a>'
    )
    found = re.search(pattern, report.html)
    assert found, number_id
    return found


@pytest.mark.parametrize("field", ["value", "ci_low", "p_holm"])
def test_a_changed_digit_is_caught(lint, report, field):
    found = anchor(report, MACRO, field)
    text = found[1]
    digit = text[-1]
    changed = text[:-1] + str((int(digit) + 1) % 10)
    numbers, _ = lint(report.html.replace(found[0], found[0].replace(f">{text}<", f">{changed}<")))
    assert numbers
    assert set(numbers) == {f"{MACRO}: {field} is {text}, and {changed} is printed"}


def test_a_changed_sign_is_caught(lint, report):
    found = anchor(report, MACRO, "value")
    assert found[1].startswith("+")
    flipped = found[0].replace(">+", ">−")
    assert any("is printed" in s for s in lint(report.html.replace(found[0], flipped))[0])


def test_another_numbers_id_is_caught(lint, report):
    other = MACRO.replace("source_loss", "bystander_leakage")
    found = anchor(report, MACRO, "value")
    swapped = found[0].replace(f'data-number="{MACRO}"', f'data-number="{other}"')
    assert any(s.startswith(other) for s in lint(report.html.replace(found[0], swapped))[0])


def test_an_unknown_number_is_caught(lint, report):
    page = report.html.replace(f'data-number="{MACRO}"', 'data-number="contrast/none"')
    assert any("the ledger has no such number" in sentence for sentence in lint(page)[0])


def test_an_unknown_style_or_field_is_caught(lint, report):
    found = anchor(report, MACRO, "value")
    for old, new in (('style="signed"', 'style="loud"'), ('field="value"', 'field="sql"')):
        page = report.html.replace(found[0], found[0].replace(old, new))
        assert any("there is no field" in sentence for sentence in lint(page)[0])


def test_a_style_that_hides_the_value_is_caught(lint, report):
    found = anchor(report, MACRO, "value")
    hidden = found[0].replace('style="signed"', 'style="count"').replace(found[1], "0")
    (sentence,) = set(lint(report.html.replace(found[0], hidden))[0])
    assert "is no count" in sentence


def test_a_page_without_numbers_is_caught(lint):
    assert "the page prints no number of the ledger" in lint("<p>nothing</p>")[0]


STRUCTURE = [
    ('<section id="vocabulary">', '<section id="words">', "sections are summary"),
    ("<h2>Methods</h2>", "", "section methods has 0 headings"),
    ("<h2>Methods</h2>", "<h2>Methods</h2><h2>More</h2>", "section methods has 2 headings"),
    ("low-rank adaptation (LoRA)", "adapters", "LoRA is used before it is introduced"),
    ("two one-sided tests (TOST)", "TOST", "TOST is used before it is introduced"),
    ("<h2>TL;DR</h2>", "<h2>TL;DR</h2><p>small SE</p>", "SE is used before it is introduced"),
    ("<h2>Design</h2>", "<h2>Design</h2><p>RLHF</p>", "RLHF is nowhere introduced"),
    ('data-confidence="title">demonstration', 'data-confidence="title">HIGH', "the title says"),
    ('data-confidence="section">demonstration', 'data-confidence="section">LOW', "the section"),
    ('data-confidence="section"', "", "the section says None"),
]


@pytest.mark.parametrize(("old", "new", "said"), STRUCTURE)
def test_a_spoiled_part_is_caught(lint, report, old, new, said):
    _, structure = lint(spoiled(report.html, old, new))
    assert [sentence for sentence in structure if said in sentence], structure


def test_sections_out_of_order_are_caught(lint, report):
    page = report.html.replace('id="design"', 'id="x"').replace('id="methods"', 'id="design"')
    _, (sentence, *_) = lint(page.replace('id="x"', 'id="methods"'))
    assert "methods, design, confidence" in sentence


def test_a_figure_without_caption_or_words_is_caught(lint, report):
    bare = re.sub(r"<figcaption>.*?</figcaption>", "", report.html, count=1, flags=re.DOTALL)
    assert lint(bare)[1] == ["figure 1 has no caption"]
    mute = re.sub(r'alt="[^"]*"', 'alt=" "', report.html)
    assert lint(mute)[1] == [
        f"figure {i} has an image without alternative text, or none" for i in (1, 2, 3)
    ]


def sample(report, table: str) -> re.Match[str]:
    found = re.search(rf'<pre data-table="{table}"[^>]*>(.*?)</pre>', report.html, re.DOTALL)
    assert found
    return found


@pytest.mark.parametrize("table", ["training_rows", "outcomes", "questions"])
def test_a_made_up_sample_is_caught(lint, report, table):
    found = sample(report, table)
    made_up = found[0].replace(found[1], escape("I never said that."))
    (sentence,) = lint(spoiled(report.html, found[0], made_up))[1]
    assert sentence.startswith(f"the sample of table {table}, ")
    assert sentence.endswith("is not what the warehouse holds")


def test_samples_without_a_row_or_of_no_row_are_caught(lint, report):
    unnamed = re.sub(r"<pre [^>]*>", "<pre>", report.html)
    structure = lint(unnamed)[1]
    assert "there is no sample row of training_rows" in structure
    assert "there is no sample row of outcomes" in structure
    assert "the sample of no row is not what the warehouse holds" in structure


@pytest.mark.parametrize("name", ["mini", "length_matched"])
def test_prose_of_the_shipped_studies_needs_no_further_number(lint, name):
    study = load_study(MINI.with_name(f"{name}.yaml"))
    said = [*methods(study), *threats(study), forest_caption(study)]
    page = Page("".join(f"<p>{escape(text)}</p>" for text in said))
    assert [s for s in lint_numbers(page, {}, study) if "neither" in s] == []


def test_study_values_are_file_and_grid(landed):
    values = study_values(landed.study)
    assert {24, 5, 4, 8, 42, 137, 0.95, 0.01, 2000, 1 / 2001} <= values
    assert any(abs(value - 0.9) < 1e-12 for value in values)  # 1 - 2 alpha of a test
    assert not {0.212, 99, 14064} & values
