"""The DuckDB build: content, checks, and that it disturbs no reader and leaves nothing behind."""

from __future__ import annotations

import duckdb
import polars as pl
import pytest

from persona_assets.evaluation.outcomes import SCHEMA
from persona_assets.questions.bank import content_hash, from_frame
from persona_assets.reporting.warehouse import WarehouseError
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
        "cells": N_CELLS,
        "contrasts": 8 * 3 * 2,
        "equivalence": 4,
        "losses": (5 * 3 + 2 * 2) * 4 * 2,
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
    assert cells == query(warehouse, "SELECT cell FROM cells ORDER BY cell")


def test_study_and_comments_are_in_the_file(landed, warehouse):
    ((study_hash, bank_hash),) = query(
        warehouse, "SELECT study_sha256, question_bank_sha256 FROM study"
    )
    assert study_hash == landed.study.content_hash
    assert bank_hash == content_hash(from_frame(pl.read_parquet(landed.questions)))
    tables = dict(query(warehouse, "SELECT table_name, comment FROM duckdb_tables()"))
    assert len(tables) == 8
    assert all(tables.values())
    undescribed = query(
        warehouse,
        "SELECT table_name, column_name FROM duckdb_columns() "
        "WHERE comment IS NULL "
        "AND table_name IN ('outcomes', 'contrasts', 'losses', 'equivalence', 'training_rows')",
    )
    assert undescribed == []


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
    with duckdb.connect(str(target), read_only=True) as reader:
        before = reader.execute("SELECT sum(hash(cell, persona)) FROM outcomes").fetchall()
        # Another process would open the new file; this one may, once its own reader is closed.
        landed.build(target, cells=landed.frames["cells"].with_columns(note=pl.lit("new")))
        assert reader.execute("SELECT sum(hash(cell, persona)) FROM outcomes").fetchall() == before
    assert query(target, "SELECT DISTINCT note FROM cells") == [("new",)]
    assert [path.name for path in tmp_path.iterdir()] == ["warehouse.duckdb"]


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


def test_synthetic_bank_has_questions_of_every_size():
    assert {len(q.choices) for q in bank(6)} == {3, 4, 5}
