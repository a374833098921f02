"""The report's checks: the page as rendered passes, and every spoiled page is caught."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import duckdb
import pytest

from persona_assets.reporting import queries
from persona_assets.reporting.ledger import Ledger
from persona_assets.reporting.lint import (
    Page,
    lint_audits,
    lint_markdown,
    lint_numbers,
    lint_structure,
)
from persona_assets.reporting.printed import Page as Printing
from persona_assets.reporting.printed import StudyValues
from persona_assets.reporting.prose import forest_caption, methods
from persona_assets.reporting.report import render_report
from persona_assets.reporting.trace import read_ledger
from persona_assets.reporting.words import visible
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
                lint_numbers(page, db, ledger, landed.study),
                lint_structure(page, ledger, queries.checks(db), landed.study),
            )

        yield checked


def spoiled(source: str, old: str, new: str) -> str:
    """The page with the first ``old`` replaced."""
    assert old in source, old
    return source.replace(old, new, 1)


def test_the_rendered_page_passes(report, warehouse, landed):
    found = lint_audits(report, warehouse, landed.study)
    assert [audit.details["violations"] for audit in found] == [[], []]
    assert {audit.name: audit.status for audit in found} == {
        "numbers_in_ledger": "passed",
        "report_structure": "passed",
    }


def test_a_spoiled_page_fails_both_audits(report, warehouse, landed):
    page = spoiled(report.html, "<h2>Findings</h2>", "<p>0.777</p>")
    numbers, structure = lint_audits(replace(report, html=page), warehouse, landed.study)
    assert (numbers.status, structure.status) == ("failed", "failed")
    assert "0.777 is accounted for nowhere" in numbers.details["violations"][0]
    assert structure.details["violations"] == ["section findings has 0 headings, not one"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("The effect is 0.212.", "0.212"),
        ("It fell by −0.017 (p < 0.0001).", "−0.017"),
        ("14\u00a0064 pairs", "064"),
        ("98\u00a0% of them", "98"),
        ("an effect of 17pp", "17pp"),
        ("version 3.14.15", "3.14.15"),
        ("a share of .37", ".37"),
        ("one in ½ or 1/2", "1/2"),
        # What the study file holds as well names no place there.
        ("seed 137", "137"),
        ("the 95\u00a0% interval", "95"),
        ("24 cells", "24"),
    ],
)
def test_a_typed_number_is_caught(lint, report, typed, said):
    numbers, _ = lint(spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2><p>{typed}</p>"))
    assert any(f"{said} is accounted for nowhere" in sentence for sentence in numbers), numbers


@pytest.mark.parametrize("typed", ["revision a09a35458c70", "Qwen/Qwen2.5-7B-Instruct", "H1", "H3"])
def test_the_study_files_names_may_be_typed(typed, warehouse):
    study = load_study(MINI.with_name("length_matched.yaml"))
    with queries.open_warehouse(warehouse) as db:
        page = Page(f"<p>{typed}</p>")
        assert lint_numbers(page, db, Ledger([]), study)[1:] == []
        page = Page(f"<p>{typed[:-1]}9</p>")
        assert len(lint_numbers(page, db, Ledger([]), study)[1:]) == 1


@pytest.mark.parametrize(
    ("typed", "caught"),
    [("<code>0.212</code>", True), ("<code>42</code>", True), ("<code>no_cot</code>", False)],
)
def test_a_number_set_as_code_is_caught(lint, report, typed, caught):
    numbers, _ = lint(spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2>{typed}"))
    assert any("is set as code" in sentence for sentence in numbers) is caught


def stated(report, path: str) -> re.Match[str]:
    found = re.search(rf'<span data-study="{path}" data-style="[a-z]*">([^<]*)</span>', report.html)
    assert found, path
    return found


def test_a_changed_value_of_the_study_file_is_caught(lint, report):
    found = stated(report, "training.rank")
    assert found[1] == "16"
    (sentence,) = lint(spoiled(report.html, found[0], found[0].replace(">16<", ">32<")))[0]
    assert sentence == "training.rank of the study file is 16, and 32 is printed"
    other = found[0].replace("training.rank", "training.alpha")
    (sentence,) = lint(spoiled(report.html, found[0], other))[0]
    assert sentence == "training.alpha of the study file is 32, and 16 is printed"
    none = found[0].replace("training.rank", "training.moods")
    (sentence,) = lint(spoiled(report.html, found[0], none))[0]
    assert sentence.startswith("the study file states no 'training.moods'")


@pytest.fixture(scope="module")
def lint_text(landed, warehouse, report):
    """Violations of the report's Markdown, with its marks."""
    page = Page(report.html)
    with queries.open_warehouse(warehouse) as db:
        ledger = read_ledger(db)

        def checked(marked: str, study=landed.study) -> list[str]:
            return lint_markdown(marked, page, db, ledger, study)

        yield checked


@pytest.mark.parametrize(
    "typed",
    [
        *("The effect is 0.213.", "| 0.213 |", "**0.213**", "seed 999", "-| 0.777 |", "a ½ of it"),
        *("```text\n99999\n```", "p = `0.0001`", "![p = 0.04](x.svg)"),
        "The effect is +0.125 and 42 of 60 collapsed.",  # numbers that stand elsewhere on the page
    ],
)
def test_a_number_typed_into_the_markdown_is_caught(lint_text, report, typed):
    assert lint_text(report.marked_markdown) == []
    spoiled_text = report.marked_markdown.replace("## Findings", f"## Findings\n\n{typed}")
    assert lint_text(spoiled_text)


def test_a_changed_number_or_name_of_the_markdown_is_caught(lint_text, report):
    value = re.search(r"\*\*\ue000(\+0\.\d+)\ue002\*\*", report.marked_markdown)
    changed = report.marked_markdown.replace(value[0], value[0].replace(value[1], "+0.9999"), 1)
    assert lint_text(changed) == ["+0.9999 is in the Markdown, and not on the page"]
    renamed = report.marked_markdown.replace(
        "`librarian.garbage_cot.42`", "`librarian.garbage_cot.43`"
    )
    if renamed != report.marked_markdown:
        assert "librarian.garbage_cot.43 is set as code" in lint_text(renamed)[0]


def test_names_of_the_study_file_may_stand_in_the_markdown(lint_text, report, landed):
    named = report.marked_markdown.replace("## Findings", "## Findings\n\nOf big\\_7\\_b.")
    assert len(lint_text(named)) == 1
    study = landed.study.model_copy(update={"title": "What is leaked by big_7_b?"})
    assert lint_text(named, study) == []


HOSTILE_FINDINGS = (
    "`A`=12 answers",
    "x`5 y`z7",
    "a\\*5",
    "\\_7",
    "'\\\\5'",
    "| 7 | ``` 8\n```text\n9",
    "\ue0007\ue002",
)


def test_what_a_check_says_cannot_hold_the_report_back(landed, warehouse, figures, tmp_path):
    """Whatever characters its finding holds, it is quoted, in both forms."""
    path = Path(shutil.copy(warehouse, tmp_path))
    for text in HOSTILE_FINDINGS:
        with duckdb.connect(str(path)) as db:
            db.execute("UPDATE checks SET observed = $1 WHERE status = 'failed'", [text])
        rendered = render_report(path, landed.study, figures)
        assert visible(text) in unescape(rendered.html)
        found = lint_audits(rendered, path, landed.study)
        assert [audit.details["violations"] for audit in found] == [[], []], text


@pytest.mark.parametrize(
    "typed",
    [
        *("<svg><text>12345</text></svg>", '<img alt="effect 0.99">', '<p title="p = 0.04">x</p>'),
        *('<p aria-label="p = 0.04">x</p>', "<style>p::after { content: '0.99' }</style>"),
        *("<p>a ½ of it</p>", "<p>Ⅳ arms</p>", "<title>0.99</title>"),
    ],
)
def test_a_number_in_what_a_reader_sees_or_hears_is_caught(lint, report, typed):
    numbers, _ = lint(spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2>{typed}"))
    assert any("is accounted for nowhere" in sentence for sentence in numbers), numbers


def test_acronyms_of_the_study_files_own_words_are_its_authors(landed, warehouse, report):
    study = landed.study.model_copy(update={"title": "Does CoT leak under LoRA on an RTX GPU?"})
    source = report.html.replace(landed.study.title, study.title)
    with queries.open_warehouse(warehouse) as db:
        ledger, checks = read_ledger(db), queries.checks(db)
        assert lint_structure(Page(source), ledger, checks, study) == []
        assert lint_structure(Page(source), ledger, checks, landed.study)


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
    assert lint("<p>nothing</p>")[0] == ["the page prints no number of the ledger"]


STRUCTURE = [
    ('<section id="vocabulary">', '<section id="words">', "sections are tldr"),
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
    assert "summary, methods, findings" in sentence


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
    (sentence,) = lint(spoiled(report.html, found[0], made_up))[0]
    assert sentence.startswith(f"what is quoted of table {table}, ")
    assert sentence.endswith("is not what the warehouse holds")


@pytest.mark.parametrize("column", ["observed", "threshold", "details"])
def test_a_changed_finding_of_a_check_is_caught(lint, report, column):
    pattern = rf'<span data-table="checks" data-column="{column}"[^>]*>([^<]*)</span>'
    found = re.search(pattern, report.html)
    if column == "details":  # nothing but the origin differs between the arms of this study
        assert found is None
        return
    changed = found[0].replace(found[1], found[1] + " of 9")
    (sentence,) = lint(spoiled(report.html, found[0], changed))[0]
    assert "of table checks" in sentence


@pytest.mark.parametrize(
    "name", ["cells", "numbers", "study", "duckdb_settings()", "training_rows; DROP TABLE cells"]
)
def test_no_other_table_can_be_quoted(lint, report, name):
    quoted = f'<span data-table="{name}" data-column="value" data-cell="x">7</span>'
    page = spoiled(report.html, "<h2>Findings</h2>", f"<h2>Findings</h2>{quoted}")
    (sentence,) = lint(page)[0]
    assert sentence.startswith(f"what is quoted of table {name}")


def test_samples_without_a_row_or_of_no_row_are_caught(lint, report):
    unnamed = re.sub(r"<pre [^>]*>", "<pre>", report.html)
    structure = lint(unnamed)[1]
    assert "there is no sample row of training_rows" in structure
    assert "there is no sample row of outcomes" in structure
    assert "a sample names no row of the warehouse" in structure


@pytest.mark.parametrize("name", ["mini", "length_matched"])
def test_prose_of_the_shipped_studies_names_every_number(name, warehouse):
    study = load_study(MINI.with_name(f"{name}.yaml"))
    printing = Printing(Ledger([]), study.inference.family_alpha)
    said = [*methods(study), forest_caption(study)]
    page = Page(
        "".join(
            f"<p>{''.join(escape(p) if type(p) is str else printing.marked(p) for p in s)}</p>"
            for s in said
        )
    )
    assert len(page.of("data-study")) > 20
    with queries.open_warehouse(warehouse) as db:
        assert lint_numbers(page, db, Ledger([]), study) == [
            "the page prints no number of the ledger"
        ]


def test_study_values_are_file_and_grid(landed):
    values = StudyValues(landed.study)
    assert values["grid.cells"] == 24
    assert values["grid.arm.persona_cot"] == 4
    assert values["grid.bystanders"] == 4
    assert [values[f"seeds.{i}"] for i in range(2)] == [42, 137]
    assert values["inference.confidence"] == 0.95
    assert values["grid.least_p"] == 1 / 2001
    assert values["grid.level.0.05"] == 0.9
    assert values["contrasts.3.equivalence.1.margin"] == 0.05
    assert "demonstration" not in values  # a truth value is no number
    assert values.say("inference.confidence", "percent").text == "95\u00a0%"
