"""Some of the tiny study made again from scratch; and that no difference goes unnoticed."""

from __future__ import annotations

import shutil
from dataclasses import replace

import duckdb
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file, save_file

from persona_assets.graph import Graph
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project
from persona_assets_tests.reliability import determinism
from persona_assets_tests.reliability.content import content_of
from persona_assets_tests.reliability.determinism import KINDS, compared, difference

CELL = "librarian.garbage_cot.42"
CONTRAST = "generic_cot-garbage_cot.source_loss"


@pytest.fixture(scope="module")
def theirs(project, tmp_path_factory) -> Project:
    """A copy of the tiny study for this module's tests, each with partitions of its own."""
    return project.copy(tmp_path_factory.mktemp("determinism") / "data")


def test_what_is_made_again_is_the_same(project, own_project):
    again = [Ref(asset, CELL) for asset in ("training_dataset", "checkpoint", "cell_outcomes")]
    again += [Ref("contrast_estimate", CONTRAST), Ref("warehouse"), Ref("report")]
    for ref in again:
        shutil.rmtree(own_project.store.folder(ref))
    done = own_project.run("run", "--study", "tiny", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    # What stands on a cell is not made again if the cell came out the same: a run each of the
    # cell, the contrast and the aggregates. The ledger is the old one, whose SQL the warehouse,
    # made of another run's rows, must still answer.
    assert done.stdout.count(" done in ") == 3
    assert set(own_project.states().values()) == {"fresh"}
    for ref in again:
        runs = {p.store.landed(ref).provenance.run_id for p in (project, own_project)}
        assert len(runs) == 2, ref
    rows = compared(project, own_project)
    assert [fault for row in rows for fault in row.faults] == []
    assert [row.tried for row in rows] == [
        sum(ref.asset in assets for ref in project.graph.refs) for assets in KINDS.values()
    ]
    assert sum(row.tried for row in rows) == len(project.graph.refs)


def test_all_that_a_run_makes_is_compared(mini, project):
    """Of the study that is made twice, which says where it is published, too."""
    compared = {asset for assets in KINDS.values() for asset in assets}
    published = Graph(mini).assets.keys() - compared
    assert published == {"wandb_run", "wandb_bundle"}
    assert {Graph(mini).assets[name].group for name in published} == {"publish"}
    assert compared == project.graph.assets.keys() | {"forced_rationales"}  # some studies have it


def tampered(project: Project, ref: Ref, name: str, change) -> None:
    """Land a partition again with one file changed: ``change`` is given its path."""
    store, manifest = project.store, project.store.landed(ref)
    with store.draft(ref) as draft:
        for path in store.directory(ref).iterdir():
            shutil.copy(path, draft)
        change(draft / name)
        store.land(ref, draft, provenance=replace(manifest.provenance, run_id="another"))


def table(**columns):
    """A change of a Parquet file: new values of columns."""
    return lambda path: pl.read_parquet(path).with_columns(**columns).write_parquet(path)


def sql(statement: str):
    """A change of a DuckDB file."""

    def change(path) -> None:
        with duckdb.connect(str(path)) as db:
            db.execute(statement)

    return change


def one_ulp(path) -> None:
    tensors = load_file(path)
    name = min(tensors)
    tensors[name].flat[0] = np.nextafter(tensors[name].flat[0], np.float32(1))
    save_file(tensors, path, metadata={"format": "pt"})


def one_word(path) -> None:
    text = path.read_text("utf-8")
    assert "the untrained model" in text
    path.write_text(text.replace("the untrained model", "the trained model", 1), "utf-8")


@pytest.mark.parametrize(
    ("ref", "name", "change", "says"),
    [
        (Ref("checkpoint", CELL), "adapter_model.safetensors", one_ulp, "its bytes"),
        (
            Ref("cell_outcomes", CELL),
            "outcomes.parquet",
            table(is_correct=~pl.col("is_correct")),
            "outcomes.is_correct",
        ),
        (
            Ref("contrast_estimate", CONTRAST),
            "estimates.parquet",
            table(ci_low=pl.col("ci_low") + 1e-16, scope=pl.col("scope").reverse()),
            "estimates.ci_low, estimates.scope",
        ),
        (
            Ref("number_ledger"),
            "numbers.parquet",
            table(n=pl.col("n") + 1),
            "numbers.n",
        ),
        (
            Ref("warehouse"),
            "warehouse.duckdb",
            sql("UPDATE outcomes SET is_correct = NOT is_correct, run_id = 'another'"),
            "outcomes.is_correct",
        ),
        (Ref("report"), "report.html", one_word, "its bytes"),
    ],
    ids=lambda value: value.asset if isinstance(value, Ref) else "",
)
def test_a_difference_is_noticed(project, theirs, ref, name, change, says):
    assert difference(project, theirs, ref) is None
    tampered(theirs, ref, name, change)
    assert difference(project, theirs, ref) == f"{ref}: {name} differs in {says}"


def test_differences_are_counted_by_kind(project, monkeypatch):
    wrong = Ref("checkpoint", CELL)
    monkeypatch.setattr(
        determinism, "difference", lambda a, b, ref: "they differ" if ref == wrong else None
    )
    rows = {row.fault.rpartition(" ")[2]: row for row in compared(project, project)}
    assert {kind: row.lost for kind, row in rows.items()} == dict.fromkeys(KINDS, 0) | {
        "adapters": 1
    }
    assert rows["adapters"].faults == ["they differ"]


def test_runs_and_times_are_no_difference(project, theirs):
    ref = Ref("cell_outcomes", "comedian.garbage_cot.42")
    tampered(theirs, ref, "outcomes.parquet", table(run_id=pl.lit("another")))
    assert difference(project, theirs, ref) is None


def test_a_missing_partition_and_a_missing_file_are_differences(project, theirs):
    gone, less = Ref("loss_matrix"), Ref("checkpoint", "comedian.garbage_cot.42")
    (theirs.store.folder(gone) / "manifest.json").unlink()
    tampered(theirs, less, "training_log.json", lambda path: path.unlink())
    assert difference(project, theirs, gone) == "loss_matrix has not landed twice"
    assert "has the files ['adapter_config.json'" in difference(project, theirs, less)


@pytest.mark.parametrize(
    ("name", "text", "same", "other"),
    [
        (
            "report.html",
            '<a data-number="seconds/cpu" data-field="value" data-style="hours">0.12</a> of 3',
            "0.12",
            "of 3",
        ),
        (
            "report.html",
            '<span data-column="outcomes_seconds" data-cell="x">7.5</span>!',
            "7.5",
            "!",
        ),
        (
            "report.md",
            "- processor-hours on the clock: 0.039, added\n- engine: x",
            "0.039",
            "engine",
        ),
        ("report.md", "run a67fb018-7029-4b8c-abcb-564bcaed2a70 made 12", "a67fb018", "12"),
        ("training_log.json", '{"losses": [0.5], "wall_seconds": 24.5}', "24.5", "0.5]"),
    ],
)
def test_what_is_left_out_of_a_text(tmp_path, name, text, same, other):
    def of(written: str) -> dict[str, str]:
        (tmp_path / name).write_text(written, "utf-8")
        return content_of(tmp_path / name)

    digits = "1" * len(same)
    assert of(text) == of(text.replace(same, digits)) != of(text.replace(other, "0.6"))
