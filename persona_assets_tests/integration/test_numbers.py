"""The ledger of a real run: every number comes out again, from SQL and estimator alone."""

from __future__ import annotations

import json

import pytest

from persona_assets.reporting.queries import open_warehouse
from persona_assets.reporting.trace import not_reproduced, read_ledger, remade
from persona_assets.reporting.views import VIEWS
from persona_assets.store import Ref

MACRO = "contrast/persona_cot-garbage_cot/persona_cot/bystander_leakage/macro/question"


@pytest.fixture(scope="module")
def warehouse(project):
    return project.store.path(Ref("warehouse"), "warehouse.duckdb")


def test_every_number_of_the_ledger_is_what_its_sql_returns(project, warehouse):
    with open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        assert not_reproduced(db) == []
        # Eight contrasts of two sources: macro and two scopes, under two schemes.
        registered = [n for n in ledger if n.startswith("contrast/") and n.endswith("/pairs")]
        assert len(registered) == 8 * 3
        kinds = {number_id.split("/")[0] for number_id in ledger}
    assert {"contrast", "matched", "mismatch", "loss", "accuracy", "count", "vocabulary"} <= kinds
    audits = {a.name: a.status for a in project.store.landed(Ref("number_ledger")).audits}
    assert audits == {"statistics_agree": "passed"}
    audits = {a.name: a.status for a in project.store.landed(Ref("warehouse")).audits}
    assert audits["numbers_reproduced"] == "passed"


def test_interval_and_p_come_out_again_to_the_last_digit(warehouse):
    with open_warehouse(warehouse) as db:
        ledger = read_ledger(db)
        some = [MACRO, MACRO.replace("question", "pairs"), f"{MACRO}/equivalence_0.03"]
        some += [n for n in ledger if n.startswith("vocabulary/persona_cot/persona_cot/")][:2]
        for number_id in (n for n in some if n in ledger):
            number = ledger[number_id]
            again = remade(db, ledger, number)
            assert {"value", "ci_low", "ci_high", "std_error"} <= again.keys()
            for name, value in again.items():
                assert getattr(number, name) == value, (number_id, name)


def test_trace_prints_the_lineage_and_says_that_it_is_reproduced(project):
    done = project.run("trace", "--study", "tiny", MACRO, "--rows", "--limit", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("reproduced to the last digit") == 6
    assert "NOT reproduced" not in done.stdout
    assert "librarian.persona_cot.42" in done.stdout
    assert project.study.content_hash in done.stdout
    assert "Rows (first 2):" in done.stdout


def test_trace_is_json_for_programs(project):
    done = project.run("trace", "--study", "tiny", MACRO, "--json", "--rows", "--limit", "3")
    found = json.loads(done.stdout)
    assert set(found["reproduced"].values()) == {True}
    assert found["number"]["number_id"] == MACRO
    assert len(found["rows"]) == 3
    manifest = project.store.landed(Ref("cell_outcomes", "librarian.persona_cot.42"))
    (cell,) = (c for c in found["cells"] if c["cell"] == "librarian.persona_cot.42")
    assert cell["outcomes_run_id"] == manifest.provenance.run_id
    assert cell["outcomes_sha256"] == manifest.data_version


def test_an_unknown_number_suggests_the_nearest(project):
    done = project.run("trace", "--study", "tiny", MACRO.replace("macro", "makro"))
    assert done.returncode == 1
    assert f"Did you mean '{MACRO}'?" in done.stderr


def test_sql_prints_a_table_and_can_do_nothing_else(project, tmp_path):
    query = "SELECT arm, count(*) AS n FROM outcomes WHERE arm = 'garbage_cot' GROUP BY arm"
    done = project.run("sql", "--study", "tiny", query)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["arm          n", "-----------  ----", "garbage_cot  2112"]
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    for hostile in (
        "DROP TABLE outcomes",
        "CREATE TABLE t AS SELECT 1",
        f"SELECT * FROM read_csv('{secret}')",
        f"COPY outcomes TO '{tmp_path / 'stolen.csv'}'",
        f"ATTACH '{tmp_path / 'other.duckdb'}'",
        "SET enable_external_access = true",
        "SELECT * FROM nothing",
    ):
        refused = project.run("sql", "--study", "tiny", hostile)
        assert refused.returncode == 1, hostile
        assert refused.stderr.startswith("Error: "), refused.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.csv"]


def test_views_answer_the_common_questions(warehouse):
    with open_warehouse(warehouse) as db:
        views = db.execute("SELECT view_name, comment FROM duckdb_views() WHERE NOT internal")
        comments = dict(views.fetchall())
        assert set(comments) == {"accuracies", "answers"}
        for name in ("question_losses", "predicted_letters", "stop_reasons"):  # stored
            again = f"({VIEWS[name].sql})"
            for one, other in ((name, again), (again, name)):
                differing = f"SELECT count(*) FROM ((FROM {one}) EXCEPT (FROM {other}))"
                assert db.execute(differing).fetchone() == (0,), name
        assert all(comments.values())
        undescribed = db.execute(
            "SELECT table_name, column_name FROM duckdb_columns() "
            "WHERE NOT internal AND comment IS NULL"
        ).fetchall()
        assert undescribed == []
        (share,) = db.execute(
            "SELECT sum(share) FROM predicted_letters "
            "WHERE cell = 'baseline' AND persona = 'villain' AND scaffold = 'no_cot'"
        ).fetchone()
        assert share == pytest.approx(1)


def test_diagnostics_of_every_cell(project):
    for cell in project.study.cells:
        outcomes = project.store.landed(Ref("cell_outcomes", cell.key))
        statuses = {a.name: a.status for a in outcomes.audits}
        assert statuses["base_unchanged"] == statuses["answers_parseable"] == "passed"
        diagnostics = project.store.landed(Ref("cell_diagnostics", cell.key))
        found = {a.name: a for a in diagnostics.audits}
        assert found["adapter_effect"].status == "passed"
        assert ("drift" in found) == (cell.origin == "carry_over")
        if "drift" in found:
            assert found["drift"].status == "passed", found["drift"].observed


def test_a_contrast_between_origins_is_flagged(project):
    flagged = {
        contrast.key: next(
            a
            for a in project.store.landed(Ref("contrast_estimate", contrast.key)).audits
            if a.name == "comparable"
        )
        for contrast in project.study.contrast_list
    }
    assert {a.status for a in flagged.values()} == {"failed"}
    assert not any(a.blocks for a in flagged.values())
    assert all("origin" in a.details["confounds"] for a in flagged.values())
