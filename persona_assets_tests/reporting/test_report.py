"""The report: its numbers are the warehouse's, and untrusted text stays text."""

from __future__ import annotations

import html.parser
import re

import duckdb
import polars as pl
import pytest
from markdown_it import MarkdownIt

from persona_assets.reporting.lint import lint_audits
from persona_assets.reporting.markdown import fence
from persona_assets.reporting.report import FIGURES, ReportError, render_report
from persona_assets.reporting.words import p_text, signed, visible
from persona_assets_tests.reporting.conftest import HOSTILE
from persona_assets_tests.synthetic import bank, land, small_study


class Page(html.parser.HTMLParser):
    """Tags, attributes, table rows and text of a page."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = [], [], [], ""
        self.in_row = False
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "tr":
            self.rows.append("")
            self.in_row = True
        elif tag in ("td", "th") and self.rows:
            self.rows[-1] += "|"

    def handle_data(self, data):
        self.text += data
        if self.in_row:
            self.rows[-1] += data

    def handle_endtag(self, tag):
        if tag == "tr":
            self.in_row = False


@pytest.fixture(scope="module")
def page(report):
    return Page(report.html)


def query(warehouse, sql):
    with duckdb.connect(str(warehouse), read_only=True) as db:
        return db.execute(sql).fetchall()


def test_demonstration_is_said_in_one_sentence(landed, warehouse, figures, report):
    sentence = "demonstrates the pipeline and supports no scientific claim."
    assert report.html.count(sentence) == report.markdown.count(sentence) == 1


def test_no_such_sentence_for_a_real_study(tmp_path, figures, landed):
    real = small_study(demonstration=False)
    landed.of(real).build(tmp_path / "warehouse.duckdb")
    text = render_report(tmp_path / "warehouse.duckdb", real, figures)
    assert "no scientific claim" not in text.html + text.markdown


def test_page_makes_no_request_and_runs_nothing(page):
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    sources = [v for _, name, v in page.attributes if name in ("src", "href", "srcset", "action")]
    images = [source for source in sources if source.startswith("data:image/svg+xml;base64,")]
    assert len(images) == len(FIGURES) == 3
    # What is left are links, which request nothing until they are followed.
    links = set(sources) - set(images)
    ids = {f"#{value}" for _, name, value in page.attributes if name == "id"}
    pages = {link for link in links if link.startswith("http://127.0.0.1:3000/assets/mini/")}
    assert pages
    assert links - pages <= ids
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [name for _, name, _ in page.attributes if name == "style"]


def test_every_contrast_is_stated_with_interval_and_p(landed, warehouse, page, report):
    spoken = re.sub(r"[ \n]+", " ", page.text)
    plain = report.markdown.replace("`", "").replace("*", "").replace("\\<", "<")
    for contrast in landed.study.contrast_list:
        ((estimate, low, high, p),) = query(
            warehouse,
            "SELECT estimate, ci_low, ci_high, p_holm FROM contrasts WHERE scope = 'macro' AND "
            f"scheme = 'question' AND contrast = '{contrast.name}' AND axis = '{contrast.axis}'",
        )
        said = (
            f"{contrast.a} − {contrast.b}, {contrast.axis.replace('_', ' ')}: {signed(estimate)} "
            f"(95\u00a0% interval {signed(low)} to {signed(high)}; Holm p {p_text(p, 0.01)}). "
        )
        sign = "positive" if estimate > 0 else "negative"
        verdict = (
            "not shown to differ from zero at family-wise 0.01"
            if p > 0.01
            else f"differs from zero ({sign})"
        )
        assert said + verdict in spoken
        assert said + verdict[0].upper() + verdict[1:] in plain
    rule = (
        "“Differs from zero” means Holm-adjusted p ≤ 0.01 with questions drawn; the interval shown"
    )
    assert spoken.count(rule) == plain.count(rule) == 2  # findings and methods


def test_synthetic_study_tells_the_verdicts_apart(landed):
    """Some verdict turns on Holm's correction, some on the scheme: the test above can fail."""
    macro = landed.frames["contrasts"].filter(scope="macro")
    question = macro.filter(scheme="question")
    assert question.filter(pl.col("p_holm") <= 0.01).height
    assert question.filter(
        pl.col("p_value") <= 0.01, pl.col("p_holm").is_between(0.01, 0.05)
    ).height
    pairs = macro.filter(scheme="pairs")
    assert ((question["p_holm"] <= 0.01) != (pairs["p_holm"] <= 0.01)).any()


def contrast_cells(page, contrast, columns):
    """The cells of a contrast's row in the HTML table that has ``columns`` columns."""
    name = f"{contrast.a} − {contrast.b}{contrast.axis.replace('_', ' ')}"
    (row,) = (r for r in page.rows if name in r and r.count("|") == columns)
    return [cell.strip() for cell in row.split("|")[1:]]


def test_contrast_table_has_both_schemes_and_their_ratio(landed, page):
    macro = landed.frames["contrasts"].filter(scope="macro")
    for contrast in landed.study.contrast_list:
        rows = {
            row["scheme"]: row
            for row in macro.filter(contrast=contrast.name, axis=contrast.axis).iter_rows(
                named=True
            )
        }
        expected = []
        for scheme in ("question", "pairs"):
            row = rows[scheme]
            interval = f"[{signed(row['ci_low'])}, {signed(row['ci_high'])}]"
            expected += [interval, f"{row['std_error']:.4f}", p_text(row["p_holm"], 0.01)]
        cells = contrast_cells(page, contrast, 12)
        assert cells[3:9] == expected
        ratio = rows["question"]["std_error"] / rows["pairs"]["std_error"]
        assert cells[9] == f"{ratio:.2f}"
        assert abs(ratio - 1) > 0.1
        assert cells[11] == "12 questions48 pairs"


def test_estimates_by_source_are_of_the_headline_scheme(landed, page):
    frame = landed.frames["contrasts"]
    for contrast in landed.study.contrast_list:
        _, *cells = contrast_cells(page, contrast, 3)
        for source, cell in zip(landed.study.sources, cells, strict=True):
            (row,) = frame.filter(
                contrast=contrast.name, axis=contrast.axis, scope=source, scheme="question"
            ).iter_rows(named=True)
            low, high = signed(row["ci_low"]), signed(row["ci_high"])
            assert cell == f"{signed(row['estimate'])}[{low}, {high}]"


def test_equivalence_is_stated_apart(landed, warehouse, report):
    tests = query(
        warehouse, "SELECT margin, alpha, equivalent FROM equivalence WHERE scheme = 'question'"
    )
    assert len(tests) == 2
    for margin, alpha, equivalent in tests:
        words = "equivalent" if equivalent else "not shown equivalent"
        assert f"{words} within ±{margin:g}" in report.markdown
        assert f"{100 - 200 * alpha:g}\u00a0% interval" in report.markdown


def test_both_schemes_and_every_loss_stand_in_tables(landed, warehouse, page):
    rows = "\n".join(page.rows)
    macro = "SELECT std_error FROM contrasts WHERE scope = 'macro'"
    assert all(f"{error:.4f}" in rows for (error,) in query(warehouse, macro))
    for arm in landed.study.arms:
        for axis in ("source_loss", "bystander_leakage"):
            cells = [
                signed(loss)
                for (loss,) in query(
                    warehouse,
                    "SELECT loss FROM losses WHERE scope = 'macro' "
                    f"AND arm = '{arm}' AND axis = '{axis}' "
                    "ORDER BY list_position(['no_cot', 'generic_cot', 'persona_cot', "
                    "'empty_persona_cot'], scaffold)",
                )
            ]
            pattern = r"\s*\|".join(["", re.escape(arm), *map(re.escape, cells), ""])
            assert re.search(pattern, rows), (arm, axis)


def test_scrolling_regions_and_headers_are_named_for_screen_readers(page):
    regions = [tag for tag, name, value in page.attributes if (name, value) == ("role", "region")]
    labels = [v for tag, name, v in page.attributes if name == "aria-label" and tag != "th"]
    stops = [tag for tag, name, _ in page.attributes if name == "tabindex"]
    assert len(regions) == len(stops) == len(labels) - 1 == len(set(labels)) - 1 == 19
    assert "Sections" in labels  # the list of sections does not scroll
    scopes = [value for tag, name, value in page.attributes if (tag, name) == ("th", "scope")]
    assert len(scopes) == page.tags.count("th")
    assert set(scopes) == {"col", "colgroup", "row"}


def test_design_counts_come_from_the_grid(landed, page):
    rows = {row.split("|")[1]: row for row in page.rows if row.count("|") == 10}
    assert rows["contradicting_cot"].split("|")[2] == "trained here"
    assert rows["persona_cot"].split("|")[2] == "carried over"
    assert rows["persona_cot"].split("|")[-2:] == ["4", "960"]
    assert rows["persona_cot_correct"].split("|")[-2:] == ["2", "480"]
    assert "24 of 24" in page.text


def test_baseline_accuracy_by_scaffold(warehouse, page):
    for scaffold, accuracy in query(
        warehouse,
        "SELECT scaffold, count(*) FILTER (is_correct) / count(*) FROM outcomes "
        "WHERE cell = 'baseline' GROUP BY scaffold",
    ):
        (row,) = (r for r in page.rows if r.startswith(f"|{scaffold}|{accuracy:.3f}|"))
        by_persona = query(
            warehouse,
            "SELECT count(*) FILTER (is_correct) / count(*) AS accuracy, persona FROM outcomes "
            f"WHERE cell = 'baseline' AND scaffold = '{scaffold}' GROUP BY persona ORDER BY ALL",
        )
        (lowest, name), (highest, _) = by_persona[0], by_persona[-1]
        assert lowest < highest
        cells = [cell.strip() for cell in row.split("|")]
        assert cells[-2:] == [f"{lowest:.3f} ({name})", f"{highest:.3f}"]


def test_no_persona_is_lowest_where_all_tie(landed, tmp_path, figures):
    equal = pl.col("number_id").str.starts_with("accuracy/")
    value = pl.when(equal).then(1.0).otherwise("value")
    numbers = landed.frames["more"]["numbers"].with_columns(value=value)
    more = landed.frames["more"] | {"numbers": numbers}
    landed.build(tmp_path / "warehouse.duckdb", more=more)
    rendered = render_report(tmp_path / "warehouse.duckdb", landed.study, figures)
    assert rendered.markdown.count("| 1.000 (–) | 1.000 |") == 4
    assert Page(rendered.html).text.count("1.000 (–)") == 4


def test_hostile_text_is_shown_not_obeyed_in_html(report, page):
    assert "<script" not in report.html
    assert "<img src=x" not in report.html
    assert visible(HOSTILE) in page.text
    assert "\x1b" not in report.html
    assert "\u202e" not in report.html


def test_hostile_text_is_shown_not_obeyed_in_markdown(report):
    assert "\x1b" not in report.markdown
    assert "\u202e" not in report.markdown
    assert str(fence(HOSTILE)) in report.markdown
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(report.markdown)
    inline = [child for token in tokens for child in token.children or ()]
    assert not [t for t in (*tokens, *inline) if t.type in ("html_block", "html_inline")]
    assert [t.attrs["href"] for t in inline if t.type == "link_open"] == []
    shown = [t.content.rstrip("\n") for t in tokens if t.type == "fence"]
    assert visible(HOSTILE) in shown
    assert sum(visible(HOSTILE) in text for text in shown) > 10


def test_markdown_tables_are_whole(report):
    tables = re.findall(r"(?:^\|.*\n)+", report.markdown, flags=re.MULTILINE)
    assert len(tables) == 13
    for table in tables:
        lines = table.splitlines()
        assert len({line.count("|") for line in lines}) == 1, lines[0]
        assert set(lines[1]) <= set("|-:")


def test_carried_over_rows_are_marked(landed, page, report):
    marked = sum(use.origin == "carry_over" for use in landed.study.arms.values())
    assert page.text.count("reference, not what this checkpoint saw") == marked == 3
    assert report.markdown.count("Reference, not what this checkpoint saw.") == marked


def test_rendering_is_deterministic(landed, warehouse, figures, report):
    assert render_report(warehouse, landed.study, figures) == report


def test_refuses_a_warehouse_of_another_study_file(warehouse, figures):
    with pytest.raises(ReportError, match="Materialize the warehouse again"):
        render_report(warehouse, small_study(seed=187), figures)


def test_refuses_to_render_without_a_figure(landed, warehouse, figures):
    with pytest.raises(ReportError, match="loss_heatmap"):
        render_report(warehouse, landed.study, {"forest_plot": figures["forest_plot"]})


def test_refuses_a_missing_number(landed, tmp_path, figures):
    missing = "contrast/persona_cot-garbage_cot/persona_cot/source_loss/macro/question"
    numbers = landed.frames["more"]["numbers"].filter(pl.col("number_id") != missing)
    landed.build(tmp_path / "warehouse.duckdb", more=landed.frames["more"] | {"numbers": numbers})
    with pytest.raises(ReportError, match=f"table numbers: no number '{missing}'"):
        render_report(tmp_path / "warehouse.duckdb", landed.study, figures)


def test_every_ledger_link_has_a_row_and_every_row_its_cells(landed, page):
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    printed = {value for _, name, value in page.attributes if name == "data-number"}
    assert {f"n-{number_id}" for number_id in printed} == {i for i in ids if i.startswith("n-")}
    pages = {v for _, name, v in page.attributes if name == "href" and "partition=" in v}
    assert pages == {
        f"http://127.0.0.1:3000/assets/mini/cell_outcomes?view=partitions&partition={cell.key}"
        for cell in landed.study.cells
    }


def test_estimates_by_source_and_seed(landed, page):
    numbers = dict(landed.frames["more"]["numbers"].select("number_id", "value").iter_rows())
    wanted = []
    for contrast in landed.study.contrast_list:
        for source in (*landed.study.sources, "macro"):
            key = f"contrast/{contrast.name}/persona_cot/{contrast.axis}/{source}"
            values = [signed(numbers[f"{key}/seed_{seed}"]) for seed in landed.study.seeds]
            wanted.append(["all" if source == "macro" else source, *values])
    rows = [[cell.strip() for cell in row.split("|")[2:]] for row in page.rows]
    start = rows.index(["source", "seed 42", "seed 137"]) + 1
    assert rows[start : start + len(wanted)] == wanted


def test_vocabulary_says_the_words_and_the_increases(landed, page, report):
    numbers = landed.frames["more"]["numbers"].rows_by_key("number_id", named=True, unique=True)
    number = numbers["vocabulary/persona_cot/persona_cot/bystander_leakage/macro/question"]
    assert number["value"] > 0
    low, high = signed(number["ci_low"], 4), signed(number["ci_high"], 4)
    assert f"{signed(number['value'], 4)}[{low}, {high}]" in "".join(page.rows)
    for source in landed.study.sources:
        assert any(row.startswith(f"|{source}|{source}ish") for row in page.rows)
    assert "`librarian`: `librarianish`" in report.markdown


def test_a_study_of_one_source_with_earlier_values(tmp_path):
    """No vocabulary to measure, and an earlier experiment to compare with."""
    raw = small_study().model_dump(mode="json")
    contrasts = raw["contrasts"]
    contrasts[2]["published"] = {"source_loss": {"estimate": 0.212, "interval": [0.2, 0.22]}}
    contrasts[3]["published"] = {"source_loss": {"estimate": -0.017}}
    study = small_study(
        sources=["librarian"],
        arms={arm: {"origin": "trained"} for arm in raw["arms"]},
        contrasts=contrasts,
    )
    (tmp_path / "landed").mkdir()
    landed = land(tmp_path / "landed", study, bank(4))
    warehouse = tmp_path / "warehouse.duckdb"
    landed.build(warehouse)
    image = b"<svg/>"
    rendered = render_report(warehouse, study, {"forest_plot": image, "loss_heatmap": image})
    assert "Not measured: a lexicon is what sets one source apart" in rendered.html
    assert "Not measured: a lexicon is what sets one source apart" in rendered.markdown
    audits = lint_audits(rendered, warehouse, study)
    assert [audit.details for audit in audits if audit.status != "passed"] == []
    page = Page(rendered.html)
    for contrast, earlier, interval in (
        ("persona_cot-garbage_cot", 0.212, "[+0.200, +0.220]"),
        ("contradicting_cot-generic_cot", -0.017, "–"),
    ):
        ((estimate, low, high),) = query(
            warehouse,
            "SELECT estimate, ci_low, ci_high FROM contrasts WHERE scope = 'macro' AND scheme = "
            f"'question' AND contrast = '{contrast}' AND axis = 'source_loss'",
        )
        name = contrast.replace("-", " − ") + "source loss"
        (row,) = (r for r in page.rows if r.startswith(f"|{name}|{signed(earlier)}|"))
        cells = row.split("|")
        assert cells[3:5] == [interval, signed(estimate)]
        assert cells[6:] == [f"[{signed(low)}, {signed(high)}]", signed(estimate - earlier)]


def test_diagnostics_are_the_warehouses(landed, warehouse, page):
    lines = [row.replace("\n", "") for row in page.rows]
    rows = "\n".join(lines)
    arms = {"baseline": "cell = 'baseline'", "persona_cot": "arm = 'persona_cot'"}
    for arm, condition in arms.items():
        ((share,),) = query(
            warehouse,
            "SELECT max(n / total) FROM (SELECT count(*) AS n, "
            "sum(count(*)) OVER (PARTITION BY cell, persona) AS total FROM outcomes "
            f"WHERE scaffold = 'no_cot' AND {condition} GROUP BY cell, persona, predicted_letter)",
        )
        assert f"|{arm}|{share:.3f}|" in rows
    # Synthetic rationales all end by their tag, after as many tokens as they have words.
    assert re.search(r"\|baseline\|1\.000\|0\.000\|0\.000\|0\.000\|0\.000\|\d+\.\d", rows)
    (row,) = (r for r in lines if r.startswith("|cell_diagnostics|letter_collapse|"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:6] == ["23", "1", "0"]
    failed = landed.study.cells[2].key
    assert cells[6] == f"{failed}: 6 of 60 answers are of one letter Asked: at most 5 %"
    (row,) = (r for r in lines if r.startswith("|training_dataset|loss_token_parity|"))
    n = str(len(landed.study.cells_of("carry_over")))
    assert row.split("|")[3:6] == ["0", "0", n]
    assert f"{n} came out as they were within the study's tolerance" in page.text


def test_compute_is_told_by_device_and_by_stage(landed, page, warehouse):
    """Evaluations of 4.25 s on a GPU (24 cells and the baseline), trainings of 2.5 s on a CPU."""
    trained, carried = (len(landed.study.cells_of(o)) for o in ("trained", "carry_over"))
    assert f"graphics processor (GPU) hours{25 * 4.25 / 3600:.3g}" in page.text
    assert f"processor-hours on the clock{2.5 * trained / 3600:.3g}" in page.text
    seconds = dict(query(warehouse, "SELECT number_id, value FROM numbers WHERE unit = 'seconds'"))
    assert seconds == {
        "seconds/training": 2.5 * trained,
        "seconds/fetching": 2.5 * carried,
        "seconds/evaluation": 25 * 4.25,
        "seconds/cuda": 25 * 4.25,
        "seconds/cpu": 2.5 * trained,
    }
