"""What a partition's page shows: schemas, column lineage, plots, links there and back."""

from __future__ import annotations

import re
import shlex

import dagster as dg
import duckdb
import polars as pl
import pytest

from persona_assets import environment
from persona_assets.columns import _BESIDE_THE_WAREHOUSE, LINEAGE, describe, sources
from persona_assets.rationales.condition import SCHEMA as RATIONALES
from persona_assets.reporting.warehouse import CELLS_SCHEMA, CHECKS_SCHEMA
from persona_assets.store import Ref

CELL = "librarian.garbage_cot.42"
CONTRAST = "generic_cot-garbage_cot.source_loss"

_ESTIMATE = (
    "number_id kind contrast axis hypothesis arm_a scaffold_a arm_b scaffold_b scope scheme "
    "n_values unit n_pairs n_resamples"
)
_OUTCOME = (
    "study cell source arm seed origin persona is_source scaffold run_id checkpoint_sha256 "
    "code_version"
)
#: The columns that come from no upstream column: from the study, from weights, from counting.
MADE_HERE = {
    "question_bank": "question_id split text choices correct_letter published_labels identity stem",
    "rationales": "",
    "training_dataset": "position source arm seed system reference_only",
    "prior_accuracies": "persona scaffold questions",
    "baseline_outcomes": _OUTCOME,
    "cell_outcomes": _OUTCOME,
    "cell_diagnostics": "",
    "contrast_estimate": _ESTIMATE,
    "exploratory_estimates": _ESTIMATE,
    "multiplicity": "",
    "loss_matrix": "axis scope n_personas n_pairs",
    "vocabulary_leakage": "lexicon.source vocabulary_scores.source vocabulary.number_id "
    "vocabulary.quantity vocabulary.name vocabulary.scaffold vocabulary.axis vocabulary.scope "
    "vocabulary.n_values vocabulary.unit vocabulary.n_resamples vocabulary.evaluations",
    "number_ledger": " ".join(
        [
            *(
                f"numbers.{column}"
                for column in [
                    "confidence",
                    "unit",
                    "n",
                    "formula",
                    "sql",
                    "sample_sql",
                    "rows_sql",
                    "estimator",
                    "divisor",
                    "n_resamples",
                    "rng_seed",
                    "rng_stream",
                ]
            ),
            # Of manifests: who made what, and what was checked of it.
            *(f"cells.{column}" for column in CELLS_SCHEMA),
            *(f"checks.{column}" for column in CHECKS_SCHEMA),
        ]
    ),
}


@pytest.fixture(scope="module")
def tables(project) -> dict[str, dict[str, list[str]]]:
    """Asset → table → columns, as they are in the landed files."""
    found: dict[str, dict[str, list[str]]] = {}
    for asset in project.graph.assets.values():
        manifest = project.store.landed(asset.refs()[0])
        for name in manifest.files:
            if name.endswith(".parquet"):
                schema = pl.read_parquet_schema(project.store.path(manifest.ref, name))
                found.setdefault(asset.name, {})[name.removesuffix(".parquet")] = list(schema)
    with duckdb.connect(
        str(project.store.path(Ref("warehouse"), "warehouse.duckdb")), read_only=True
    ) as db:
        found["warehouse"] = dict(
            db.execute(
                "SELECT table_name, list(column_name ORDER BY column_index) FROM duckdb_columns() "
                "WHERE table_name IN (SELECT table_name FROM duckdb_tables()) GROUP BY ALL "
                "ORDER BY ALL"
            ).fetchall()
        )
    return found


@pytest.fixture(scope="module")
def columns(tables) -> dict[str, list[str]]:
    """Asset → its columns as they are named to Dagster."""
    return {
        asset: [f"{t}.{c}" if len(found) > 1 else c for t, names in found.items() for c in names]
        for asset, found in tables.items()
    }


@pytest.fixture(scope="module")
def shown(project):
    """The metadata of a partition's latest materialization, by name, as Dagster keeps it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in project.environment.items():
            patch.setenv(name, value)
        with dg.DagsterInstance.get() as instance:

            def look(ref: Ref) -> dict:
                wanted = dg.AssetRecordsFilter(
                    dg.AssetKey(["tiny", ref.asset]),
                    asset_partitions=[ref.key] if ref.key else None,
                )
                (record,) = instance.fetch_materializations(wanted, limit=1).records
                return dict(record.asset_materialization.metadata)

            yield look


def test_every_column_is_described_and_every_description_is_of_a_column(tables):
    landed = [found for asset, found in tables.items() if asset != "warehouse"]
    there = {f"{t}.{c}" for found in landed for t, names in found.items() for c in names}
    assert [name for name in there if not describe(*name.split("."))] == []
    there |= {f"rationales.{column}" for column in (*RATIONALES, "persona")}  # of forcing scaffolds
    assert set(_BESIDE_THE_WAREHOUSE) <= there
    assert describe("outcomes", "mood") is None


def test_every_column_comes_from_upstream_columns_or_is_made_here(project, columns):
    assert set(MADE_HERE) == set(columns) - {"warehouse"}
    for asset, names in columns.items():
        found, upstream_assets = dict(sources(asset, names)), project.graph.upstream_assets(asset)
        if asset == "warehouse":
            here = {c for c in names if c.split(".")[0] == "study"}
        else:
            here = set(MADE_HERE[asset].split())
            assert set(LINEAGE.get(asset, ())) == set(found), asset
        assert set(names) - set(found) == here, asset
        for column, upstream in found.items():
            for source in upstream:
                above, name = source.split(".", 1)
                assert above in upstream_assets, (asset, column, source)
                assert name in columns[above], (asset, column, source)


def test_dagster_is_told_schema_and_lineage_of_what_landed(project, columns, shown):
    for asset in columns:
        ref = project.graph.assets[asset].refs()[0]
        metadata = shown(ref)
        schema = metadata["dagster/column_schema"].schema
        assert [column.name for column in schema.columns] == columns[asset]
        assert all(column.description for column in schema.columns), asset
        lineage = metadata.get("dagster/column_lineage")
        told = lineage.column_lineage.deps_by_column if lineage else {}
        assert set(told) == {column for column, _ in sources(asset, columns[asset])}
    (dep,) = shown(Ref("cell_outcomes", CELL))[
        "dagster/column_lineage"
    ].column_lineage.deps_by_column["correct_letter"]
    assert (dep.asset_key.path, dep.column_name) == (["tiny", "question_bank"], "correct_letter")


def test_rows_are_counted(project, shown):
    assert shown(Ref("question_bank"))["dagster/row_count"].value == 120
    outcomes = shown(Ref("cell_outcomes", CELL))
    assert outcomes["dagster/partition_row_count"].value == 11 * 4 * 24
    assert "dagster/row_count" not in outcomes


def test_a_cells_page_shows_its_accuracies_and_letters(project, shown):
    frame = project.store.frame(Ref("cell_outcomes", CELL))
    text = shown(Ref("cell_outcomes", CELL))["accuracy"].value
    assert text.splitlines()[0] == "| scaffold | source persona | other personas |"
    right = frame.filter(scaffold="no_cot", persona="librarian")["is_correct"].mean()
    others = frame.filter(pl.col("scaffold") == "no_cot", ~pl.col("is_source"))["is_correct"].mean()
    row = next(line for line in text.splitlines() if line.startswith("| no\\_cot "))
    assert re.findall(r"\d\.\d+", row) == [f"{right:.3f}", f"{others:.3f}"]
    assert row.count("█") == round(10 * right) + round(10 * others)
    letters = shown(Ref("cell_diagnostics", CELL))["predicted_letters"].value
    baseline = project.store.frame(Ref("baseline_outcomes"))
    shares = [(f["predicted_letter"] == "A").mean() for f in (frame, baseline)]
    row = next(line for line in letters.splitlines() if line.startswith("| A "))
    assert re.findall(r"\d\.\d+", row) == [f"{share:.3f}" for share in shares]
    assert "all personas" in shown(Ref("baseline_outcomes"))["accuracy"].value


def test_training_and_contrasts_show_their_plots(shown):
    trained = shown(Ref("checkpoint", CELL))
    first, blocks, last = trained["loss"].value.split()
    assert float(last) < float(first)
    assert len(blocks) == 36  # steps
    assert blocks[0] == "█"
    assert trained["loss_curve"].value.startswith("![plot](data:image/svg+xml;base64,")
    assert shown(Ref("contrast_estimate", CONTRAST))["intervals"].value.startswith("![plot](")


def test_what_is_to_be_seen_at_once_is_short_enough_for_the_ui(project, shown):
    """Markdown of 1000 characters and more is shown after a click only."""
    for ref in (Ref("cell_outcomes", CELL), Ref("contrast_estimate", CONTRAST), Ref("report")):
        for name in {"accuracy", "made_from", "numbers"} & set(shown(ref)):
            assert len(shown(ref)[name].value) < 1000, (ref, name)


def test_a_page_links_to_what_it_was_made_from(project, shown):
    text = shown(Ref("cell_outcomes", CELL))["made_from"].value
    upstream = project.graph.upstream(Ref("cell_outcomes", CELL))
    links = re.findall(r"\((/assets/[^)]+)\) ([0-9a-f]{8})", text)
    assert links == [
        (
            environment.partition_page("tiny", ref.asset, ref.key, base=""),
            project.store.landed(ref).data_version[:8],
        )
        for ref in upstream
    ]
    assert "more: see Lineage" in shown(Ref("contrast_estimate", CONTRAST))["made_from"].value


@pytest.mark.parametrize(
    "ref",
    [Ref("cell_outcomes", CELL), Ref("baseline_outcomes"), Ref("contrast_estimate", CONTRAST)],
)
def test_the_query_on_a_page_lists_the_partitions_numbers(project, shown, ref):
    text = shown(ref)["numbers"].value
    assert "(/assets/tiny/report)" in text
    (line,) = (line.strip() for line in text.splitlines() if "persona-assets sql" in line)
    _, *arguments = shlex.split(line)
    with project.warehouse() as db:
        found = {row[0] for row in db.execute(arguments[-1]).fetchall()}
        every = db.execute("SELECT number_id, cells FROM numbers").fetchall()
    if ref.asset == "contrast_estimate":
        key = "contrast/generic_cot-garbage_cot/persona_cot/source_loss/"
        assert found == {name for name, _ in every if name.startswith(key)}
    else:
        assert found == {name for name, cells in every if (ref.key or "baseline") in cells}
    assert len(found) > 8
    done = project.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(found)[0] in done.stdout
