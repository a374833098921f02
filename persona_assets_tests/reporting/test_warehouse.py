"""The DuckDB build: content, checks, and that it disturbs no reader and leaves nothing behind."""

from __future__ import annotations

import math
import subprocess
import sys

import duckdb
import polars as pl
import pytest

from persona_assets.evaluation.outcomes import SCHEMA
from persona_assets.questions.bank import content_hash, from_frame
from persona_assets.reporting import queries
from persona_assets.reporting.comments import COLUMNS
from persona_assets.reporting.views import VIEWS
from persona_assets.reporting.warehouse import WarehouseError, warehouse_audits
from persona_assets_tests.synthetic import bank

N_CELLS = 24  # 5 arms x 2 sources x 2 seeds, and 2 arms x 1 source x 2 seeds


def query(path, sql, **parameters):
    with duckdb.connect(str(path), read_only=True) as db:
        return db.execute(sql, parameters).fetchall()


def test_every_landed_row_is_there(landed, tmp_path):
    counts = landed.build(tmp_path / "warehouse.duckdb")
    assert counts == {
        "study": 1,
        "questions": 12 + 4,
        "outcomes": (N_CELLS + 1) * 5 * 4 * 12,
        "training_rows": N_CELLS * 4,
        "cells": N_CELLS + 1,
        "contrasts": 8 * 3 * 2,
        "equivalence": 4,
        "losses": (5 * 3 + 2 * 2) * 4 * 2,
        **{name: frame.height for name, frame in landed.frames["more"].items()},
    }
    for table, count in counts.items():
        assert query(tmp_path / "warehouse.duckdb", f"SELECT count(*) FROM {table}") == [(count,)]


def test_outcome_columns_and_values_survive(landed, warehouse):
    described = query(warehouse, "DESCRIBE outcomes")
    assert [row[0] for row in described] == SCHEMA.names()
    assert dict(row[:2] for row in described)["letter_logprobs"] == "MAP(VARCHAR, DOUBLE)"
    parquet = pl.read_parquet(landed.outcomes[3])
    key = ["persona", "scaffold", "question_id"]
    stored = query(
        warehouse,
        "SELECT persona, scaffold, question_id, letter_logprobs, rationale, is_correct "
        "FROM outcomes WHERE cell = $cell",
        cell=parquet["cell"][0],
    )
    expected = {
        tuple(row[k] for k in key): (
            {entry["key"]: entry["value"] for entry in row["letter_logprobs"]},
            row["rationale"],
            row["is_correct"],
        )
        for row in parquet.iter_rows(named=True)
    }
    assert {row[:3]: row[3:] for row in stored} == expected


def test_a_passing_build_leaves_out_texts_and_log_probabilities_alone(landed, warehouse, tmp_path):
    landed.build(tmp_path / "passing.duckdb", passing=True)
    both = "SELECT count(rationale), count(letter_logprobs) FROM outcomes"
    assert query(tmp_path / "passing.duckdb", both) == [(0, 0)]
    assert query(warehouse, both) == [(6000, 6000)]
    same = "SELECT * EXCLUDE (rationale, letter_logprobs) FROM outcomes ORDER BY ALL"
    assert query(tmp_path / "passing.duckdb", same) == query(warehouse, same)
    described = (
        "SELECT table_name, column_name, data_type, comment FROM duckdb_columns() ORDER BY ALL"
    )
    assert query(tmp_path / "passing.duckdb", described) == query(warehouse, described)
    losses = query(warehouse, "SELECT axis, scaffold, arm, source, seed FROM question_losses")
    assert losses == sorted(losses)


def test_estimates_recompute_from_the_rows(landed, warehouse):
    """SUM of integers over COUNT gives the stored estimate to the last digit."""
    for contrast in landed.study.contrast_list:
        n_personas = 1 if contrast.axis == "source_loss" else 4
        ((total, pairs),) = query(
            warehouse,
            "SELECT sum(CASE arm WHEN $b THEN 1 ELSE -1 END * is_correct::INT)::BIGINT, "
            "count(*) FILTER (arm = $a) FROM outcomes "
            "WHERE arm IN ($a, $b) AND scaffold = 'persona_cot' AND is_source = $own",
            a=contrast.a,
            b=contrast.b,
            own=n_personas == 1,
        )
        stored = query(
            warehouse,
            "SELECT DISTINCT estimate, n_pairs * $k FROM contrasts "
            "WHERE contrast = $name AND axis = $axis AND scope = 'macro'",
            k=n_personas,
            name=contrast.name,
            axis=contrast.axis,
        )
        assert stored == [(total / pairs, pairs)]


def test_training_rows_bear_their_cell_and_no_token_ids(warehouse):
    columns = [row[0] for row in query(warehouse, "DESCRIBE training_rows")]
    assert {"cell", "system", "user", "assistant", "reference_only"} <= set(columns)
    assert not {"input_ids", "loss_start"} & set(columns)
    cells = query(warehouse, "SELECT DISTINCT cell FROM training_rows ORDER BY cell")
    trained = "SELECT cell FROM cells WHERE cell <> 'baseline' ORDER BY cell"
    assert cells == query(warehouse, trained)


def test_study_and_comments_are_in_the_file(landed, warehouse):
    ((study_hash, bank_hash),) = query(
        warehouse, "SELECT study_sha256, question_bank_sha256 FROM study"
    )
    assert study_hash == landed.study.content_hash
    assert bank_hash == content_hash(from_frame(pl.read_parquet(landed.questions)))
    tables = dict(query(warehouse, "SELECT table_name, comment FROM duckdb_tables()"))
    stored = [name for name, view in VIEWS.items() if view.stored]
    assert len(tables) == 8 + len(stored) + len(landed.frames["more"])
    assert all(tables.values())
    undescribed = query(
        warehouse,
        "SELECT table_name, column_name FROM duckdb_columns() WHERE comment IS NULL "
        "AND schema_name = 'main' AND NOT internal",
    )
    assert undescribed == []
    ((described,),) = query(
        warehouse, "SELECT count(comment) FROM duckdb_columns() WHERE table_name = 'outcomes'"
    )
    assert described == len(SCHEMA)


def test_every_column_that_the_pipeline_lands_is_described():
    assert {"engine", "software", "checkpoint_source", "dataset_sha256", "title"} <= set(COLUMNS)


def test_an_undescribed_column_is_refused(landed, tmp_path):
    cells = landed.frames["cells"].with_columns(note=pl.lit("new"))
    with pytest.raises(WarehouseError, match=r"cells\.note is nowhere described"):
        landed.build(tmp_path / "warehouse.duckdb", cells=cells)


def test_columns_are_matched_by_name(landed, tmp_path):
    """A file with its columns in another order gives the same rows."""
    turned = tmp_path / "turned.parquet"
    frame = pl.read_parquet(landed.outcomes[1])
    frame.select(reversed(frame.columns)).write_parquet(turned)
    files = [landed.outcomes[0], turned, *landed.outcomes[2:]]
    landed.build(tmp_path / "one.duckdb")
    landed.build(tmp_path / "other.duckdb", outcomes=files)
    sql = "SELECT * FROM outcomes ORDER BY ALL"
    assert query(tmp_path / "one.duckdb", sql) == query(tmp_path / "other.duckdb", sql)


def test_reader_of_the_old_file_is_not_disturbed(landed, tmp_path):
    target = tmp_path / "warehouse.duckdb"
    landed.build(target)
    old = target.stat().st_ino
    sql = "SELECT DISTINCT outcomes_seconds FROM cells"
    # Another process, as a reader is: it holds the old file open while the new one is built.
    reader = subprocess.Popen(
        [sys.executable, "-c", _READER, str(target), sql],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with reader:
        assert reader.stdout.readline() == "open\n"
        landed.build(
            target, cells=landed.frames["cells"].with_columns(outcomes_seconds=pl.lit(7.0))
        )
        said, _ = reader.communicate("now\n", timeout=60)
    assert reader.returncode == 0
    assert said == "[(4.25,)]\n"
    assert target.stat().st_ino != old
    assert query(target, sql) == [(7.0,)]
    assert [path.name for path in tmp_path.iterdir()] == ["warehouse.duckdb"]


#: Opens the file, reads nothing of the table before it is told to.
_READER = """
import sys, duckdb
with duckdb.connect(sys.argv[1], read_only=True) as db:
    print("open", flush=True)
    sys.stdin.readline()
    print(db.execute(sys.argv[2]).fetchall())
"""


def damaged(folder, landed, change):
    path = folder / "damaged.parquet"
    change(pl.read_parquet(landed.outcomes[1])).write_parquet(path)
    return {"outcomes": [landed.outcomes[0], path, *landed.outcomes[2:]]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f, d: {"outcomes": [*d.outcomes, d.outcomes[1]]}, r"outcomes: 240 row\(s\) repeat"),
        (
            lambda f, d: damaged(f, d, lambda x: pl.concat([x, x[:1]])),
            "cell=.*question_id=eval-000",
        ),
        (lambda f, d: damaged(f, d, lambda x: x.drop("truncated")), "has no column truncated"),
        (
            lambda f, d: damaged(f, d, lambda x: x.with_columns(persona=pl.lit(None, pl.String))),
            "without a key",
        ),
        (
            lambda f, d: damaged(
                f, d, lambda x: x.with_columns(question_id="x" + x["question_id"])
            ),
            r"outcomes.question_id: 12 value\(s\) that questions does not have, first: xeval-000",
        ),
        (lambda f, d: {"cells": d.frames["cells"][1:]}, "outcomes.cell: 1 value"),
        (lambda f, d: {"cells": d.frames["cells"].drop("cell")}, "has no column cell"),
        (
            lambda f, d: {"outcomes": d.outcomes[:-1]},
            r"cells.cell: 1 value\(s\) that outcomes does not have, first: librarian.persona_cot_c",
        ),
        (
            lambda f, d: {"training": d.training[2:]},
            r"cells.cell: 2 value\(s\) that training_rows does not have, first: librarian.garbage",
        ),
        (lambda f, d: {"training": []}, "training_rows: there is no file"),
        (lambda f, d: {"contrasts": pl.concat([d.frames["contrasts"]] * 2)}, "contrasts: 48 row"),
    ],
)
def test_refuses_and_keeps_the_old_file(landed, tmp_path, change, says):
    target = tmp_path / "store" / "warehouse.duckdb"
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(WarehouseError, match=says):
        landed.build(target, **change(tmp_path, landed))
    assert target.read_bytes() == b"old"
    assert list(target.parent.iterdir()) == [target]


def few_numbers(landed):
    """The further tables, and of the numbers only some: the audits read every one again."""
    more = landed.frames["more"]
    losses = more["numbers"].filter(pl.col("number_id").str.starts_with("loss/"))
    return more | {"numbers": losses[:5]}


def audits(path, study):
    return {audit.name: audit for audit in warehouse_audits(path, study)}


def test_audits_pass_on_a_whole_study(landed, warehouse):
    found = audits(warehouse, landed.study)
    assert {name: audit.status for name, audit in found.items()} == {
        "complete": "passed",
        "one_wrong_letter": "passed",
        "numbers_reproduced": "passed",
    }
    assert found["complete"].observed == "6000 outcome rows"
    assert found["complete"].threshold == "25 evaluations × 240 rows = 6000"


def test_one_missing_outcome_is_not_complete(landed, tmp_path):
    faulty = damaged(tmp_path, landed, lambda x: x[1:])
    landed.build(tmp_path / "w.duckdb", **faulty, more=few_numbers(landed))
    complete = audits(tmp_path / "w.duckdb", landed.study)["complete"]
    assert complete.blocks
    assert complete.observed == "5999 outcome rows"


def test_a_number_that_is_another_in_the_last_bit_is_named(landed, tmp_path):
    more = few_numbers(landed)
    row = more["numbers"].row(3, named=True)
    other = math.nextafter(row["value"], math.inf)
    changed = pl.when(number_id=row["number_id"]).then(pl.lit(other)).otherwise("value")
    numbers = more["numbers"].with_columns(value=changed)
    landed.build(tmp_path / "w.duckdb", more=more | {"numbers": numbers})
    found = audits(tmp_path / "w.duckdb", landed.study)["numbers_reproduced"]
    assert found.blocks
    assert found.observed == "1 fields of 5 numbers do not come out again"
    named = f"{row['number_id']}, value: {other!r}, made again {row['value']!r}"
    assert found.details["numbers"] == [named]


@pytest.mark.parametrize("to_right", [False, True])
def test_a_second_wrong_letter_of_a_question_is_named(landed, tmp_path, to_right):
    """One row of one cell ends in another letter: a conflict, unless it is the correct one."""
    frame = pl.read_parquet(landed.training[0])
    row = frame.row(2, named=True)
    taken = {row["correct_letter"], row["target_letter"]}
    letter = row["correct_letter"] if to_right else next(x for x in "ABC" if x not in taken)
    changed = pl.when(question_id=row["question_id"]).then(pl.lit(letter))
    frame.with_columns(target_letter=changed.otherwise("target_letter")).write_parquet(
        tmp_path / "training.parquet"
    )
    files = [tmp_path / "training.parquet", *landed.training[1:]]
    landed.build(tmp_path / "w.duckdb", training=files, more=few_numbers(landed))
    found = audits(tmp_path / "w.duckdb", landed.study)["one_wrong_letter"]
    assert found.blocks is not to_right
    letters = ", ".join(sorted((letter, row["target_letter"])))
    named = [] if to_right else [f"{row['question_id']}: {letters}"]
    assert found.details["questions"] == named
    assert found.observed.startswith(f"{len(named)} questions")


def test_synthetic_bank_has_questions_of_every_size():
    assert {len(q.choices) for q in bank(6)} == {3, 4, 5}


def test_stored_views_have_their_rows_in_order(warehouse):
    orders = {
        "question_losses": "axis, scaffold, arm, source, seed, question_id",
        "predicted_letters": "cell, persona, scaffold, predicted_letter",
        "stop_reasons": "cell, persona, scaffold, stop_reason",
    }
    assert {name for name, view in VIEWS.items() if view.stored} <= orders.keys()
    with queries.open_warehouse(warehouse) as db:
        for name, view in VIEWS.items():
            if view.stored:
                asked = f"SELECT {orders[name]} FROM {name}"
                rows = db.execute(asked).fetchall()
                assert rows == db.execute(f"{asked} ORDER BY ALL").fetchall()
                assert len(rows) > 1
