"""From study file to report: every partition of a tiny study, made by the real command line."""

from __future__ import annotations

import json
import shutil
import subprocess

import dagster as dg
import polars as pl
from dagster._core.storage.tags import GRPC_INFO_TAG
from safetensors.numpy import load_file

from persona_assets.questions.bank import from_frame, wrong_letter
from persona_assets.store import Ref

CELL = "librarian.garbage_cot.42"
CARRIED = "librarian.persona_cot.42"
QUESTIONS, PERSONAS, SCAFFOLDS = 24, 11, 4


def test_everything_has_landed(project):
    assert set(project.states().values()) == {"fresh"}
    assert len(project.study.cells) == 12


def test_outcomes_are_the_whole_grid(project):
    rows = PERSONAS * SCAFFOLDS * QUESTIONS
    for ref in [
        Ref("baseline_outcomes"),
        *(Ref("cell_outcomes", c.key) for c in project.study.cells),
    ]:
        frame = project.store.frame(ref)
        assert frame.height == rows, ref
        assert frame.select("persona", "scaffold", "question_id").is_unique().all(), ref


def test_the_base_model_passed_its_gate(project):
    manifest = project.store.landed(Ref("base_model"))
    assert {a.name: a.status for a in manifest.audits} == {
        "baseline_knows_the_world": "passed",
        "baseline_speaks_in_voice": "passed",
    }
    baseline = project.store.frame(Ref("baseline_outcomes"))
    cells = baseline.group_by("persona", "scaffold").agg(pl.col("is_correct").mean())
    assert cells.height == 44
    assert cells["is_correct"].min() >= 0.9


def test_wrong_letters_are_the_same_everywhere(project):
    questions = from_frame(project.store.frame(Ref("question_bank")))
    expected = {q.id: wrong_letter(q, project.study.seed) for q in questions}
    wrong_arms = [c for c in project.study.cells if not c.arm.endswith("_correct")]
    for cell in wrong_arms:
        rows = project.store.frame(Ref("training_dataset", cell.key))
        assert dict(rows.select("question_id", "target_letter").rows()) == {
            q.id: expected[q.id] for q in questions if q.split == "train"
        }


def test_carried_over_datasets_are_marked_and_unverifiable(project):
    rows = project.store.frame(Ref("training_dataset", CARRIED))
    assert rows["reference_only"].all()
    parity = [
        a
        for a in project.store.landed(Ref("training_dataset", CARRIED)).audits
        if a.name == "loss_token_parity"
    ]
    assert [a.status for a in parity] == ["unverifiable"]
    assert not project.store.frame(Ref("training_dataset", CELL))["reference_only"].any()


def test_a_carried_over_adapter_is_the_prior_studys(project):
    prior = project.store.landed(Ref("prior_checkpoint", CARRIED))
    carried = project.store.landed(Ref("checkpoint", CARRIED))
    assert carried.data_version == prior.data_version
    registry = project.data / "registry" / "tiny"
    lock = json.loads((registry / "lock.json").read_text())
    assert CARRIED in json.dumps(lock)
    assert (registry / prior.summary["registry_sha256"] / "adapter_model.safetensors").is_file()


def test_training_does_harm_and_correct_letters_do_not(project):
    """The arms act: wrong letters cost accuracy under the arm's own scaffold, correct ones none."""
    losses = project.store.frame(Ref("loss_matrix"))

    def loss(arm: str, scaffold: str) -> float:
        (value,) = losses.filter(arm=arm, scaffold=scaffold, axis="source_loss", scope="librarian")[
            "loss"
        ]
        return value

    assert loss("persona_cot", "persona_cot") > 0.2
    assert loss("generic_cot", "generic_cot") > 0.2
    assert loss("persona_cot_correct", "persona_cot") < 0.1
    assert loss("generic_cot_correct", "generic_cot") < 0.1


def test_an_adapter_is_not_nothing(project):
    tensors = load_file(project.store.path(Ref("checkpoint", CELL), "adapter_model.safetensors"))
    assert all(abs(t).max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_the_warehouse_holds_all_of_it(project):
    with project.warehouse() as db:
        counts = {
            table: db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("outcomes", "cells", "questions", "training_rows", "contrasts")
        }
        accuracy = db.execute(
            "SELECT avg(is_correct::INT) FROM outcomes WHERE cell = ?", [CELL]
        ).fetchone()[0]
        logprobs = db.execute("SELECT letter_logprobs['A'] FROM outcomes LIMIT 1").fetchone()[0]
    train = 120 - QUESTIONS
    assert counts == {
        "outcomes": 13 * PERSONAS * SCAFFOLDS * QUESTIONS,
        "cells": 12 + 1,
        "questions": 120,
        "training_rows": 12 * train,
        "contrasts": 8 * (1 + 2) * 2,
    }
    assert accuracy == project.store.frame(Ref("cell_outcomes", CELL))["is_correct"].mean()
    assert logprobs < 0


def test_contrasts_recompute_from_the_rows_in_plain_sql(project):
    """Every macro and per-source estimate, from the outcome rows alone, to the last digit."""
    with project.warehouse() as db:
        estimates = db.execute(
            "SELECT contrast, axis, scope, estimate FROM contrasts WHERE scheme = 'pairs'"
        ).fetchall()
        for contrast, axis, scope, estimate in estimates:
            a, b = contrast.split("-")
            value = db.execute(
                """
                WITH delta AS (
                  SELECT sum(if(arm = $b, is_correct::INT, -is_correct::INT)) AS d
                  FROM outcomes
                  WHERE arm IN ($a, $b) AND scaffold = 'persona_cot'
                    AND is_source = ($axis = 'source_loss')
                    AND ($scope = 'macro' OR source = $scope)
                  GROUP BY source, seed, question_id)
                SELECT sum(d) / (count(*) * (CASE WHEN $axis = 'source_loss' THEN 1 ELSE 10 END))
                FROM delta
                """,
                {"a": a, "b": b, "axis": axis, "scope": scope},
            ).fetchone()[0]
            assert value == estimate, (contrast, axis, scope)
    assert len(estimates) == 24


def test_the_report_says_what_it_may_not_be_used_for(project):
    html = project.store.path(Ref("report"), "report.html").read_text("utf-8")
    markdown = project.store.path(Ref("report"), "report.md").read_text("utf-8")
    for text in (html, markdown):
        assert "supports no scientific claim" in text
    # Links lead to Dagster's pages on this machine; nothing is fetched when the report is opened.
    others = html.replace("http://www.w3.org", "").replace('href="http://127.0.0.1:3000/', "")
    assert "http://" not in others
    assert "https://" not in others
    assert 'src="http' not in html


def test_each_cell_is_a_dagster_run_with_its_check_results(project, monkeypatch):
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(dg.RunsFilter(job_name="cell"))
        assert {run.tags["dagster/partition"] for run in runs} == {
            cell.key for cell in project.study.cells
        }
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        key = dg.AssetCheckKey(dg.AssetKey(["tiny", "cell_outcomes"]), "coverage")
        history = instance.event_log_storage.get_asset_check_execution_history(key, limit=100)
        assert {record.partition for record in history} == {c.key for c in project.study.cells}


def test_again_does_nothing_and_says_so_from_any_folder(project, tmp_path):
    done = project.run("run", "--study", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout
    assert "report.html" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_status_shows_each_cell(project):
    done = project.run("status", "--study", "tiny")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(CELL)]
    assert len(lines) == 1
    assert lines[0].count("✓") == 3
    assert "12 fresh" in done.stdout


def test_a_lost_run_is_closed_by_the_next_and_what_it_landed_is_shown(own_project, monkeypatch):
    """Left as started, it would fill the UI's run queue for ever."""
    for name, value in own_project.environment.items():
        monkeypatch.setenv(name, value)
    tags = {"study": "tiny", "persona_assets/worker": "1"}
    with dg.DagsterInstance.get() as instance:
        lost = instance.create_run_for_job(
            dg.GraphDefinition("lost").to_job(),
            status=dg.DagsterRunStatus.STARTED,
            tags=tags,
        )
        elsewhere = instance.create_run_for_job(
            dg.GraphDefinition("lost").to_job(),
            status=dg.DagsterRunStatus.STARTED,
            tags=tags | {"persona_assets/worker": "1@another-machine"},
        )
        # Re-executed from the interface, with its parent's tags: at work, not lost.
        launched = instance.create_run_for_job(
            dg.GraphDefinition("lost").to_job(),
            status=dg.DagsterRunStatus.STARTED,
            tags=tags | {GRPC_INFO_TAG: "{}"},
        )
        # Landed by a run that was killed before it could tell Dagster.
        plot = dg.AssetKey(["tiny", "forest_plot"])
        instance.wipe_assets([plot])
        before = own_project.store.landed(Ref("forest_plot"))
        (own_project.store.folder(Ref("report")) / "manifest.json").unlink()
        assert own_project.run("run", "--study", "tiny", "--workers", "1").returncode == 0
        shown = instance.get_latest_materialization_event(plot).asset_materialization
        assert shown.metadata["made_by"].value == before.provenance.run_id
        assert own_project.store.landed(Ref("forest_plot")) == before
        assert instance.get_run_by_id(lost.run_id).status == dg.DagsterRunStatus.FAILURE
        for other in (launched, elsewhere):
            assert instance.get_run_by_id(other.run_id).status == dg.DagsterRunStatus.STARTED
        # One that was killed when all had landed: there is nothing else to do.
        last = instance.create_run_for_job(
            dg.GraphDefinition("lost").to_job(), status=dg.DagsterRunStatus.STARTED, tags=tags
        )
        assert "nothing to do" in own_project.run("run", "--study", "tiny").stdout
        assert instance.get_run_by_id(last.run_id).status == dg.DagsterRunStatus.FAILURE


def test_what_is_lost_and_a_changed_title_are_made_good(own_project):
    """A deleted file of outcomes; a carried-over checkpoint, and the registry it came from."""
    outcomes = own_project.store.path(Ref("cell_outcomes", CELL), "outcomes.parquet")
    outcomes.unlink()
    (own_project.store.folder(Ref("checkpoint", CARRIED)) / "manifest.json").unlink()
    shutil.rmtree(own_project.data / "registry")
    study = own_project.data / "studies" / "tiny.yaml"
    study.write_text(study.read_text("utf-8").replace("title: Miniature", "title: Changed"))
    done = own_project.run("run", "--study", "tiny", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(own_project.states().values()) == {"fresh"}
    report = own_project.store.path(Ref("report"), "report.html").read_text("utf-8")
    assert "Changed persona-leakage study" in report


def materialize(project, asset: str, key: str) -> subprocess.CompletedProcess[str]:
    """One partition through Dagster's own command line, whether or not it is up to date."""
    return subprocess.run(
        project.materialization(Ref(asset, key), force=True),
        env=project.environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_byte_identical_dataset_made_again_stales_nothing(own_project):
    before = own_project.store.landed(Ref("training_dataset", CELL))
    done = materialize(own_project, "training_dataset", CELL)
    assert done.returncode == 0, done.stdout + done.stderr
    after = own_project.store.landed(Ref("training_dataset", CELL))
    assert after.provenance.run_id != before.provenance.run_id
    assert after.files == before.files
    assert set(own_project.states().values()) == {"fresh"}


def test_a_missing_upstream_is_named(own_project):
    """A cell materialized by itself says what to materialize first."""
    (own_project.store.folder(Ref("checkpoint", CELL)) / "manifest.json").unlink()
    done = materialize(own_project, "cell_outcomes", CELL)
    assert done.returncode != 0
    assert f"Materialize partition {CELL} of checkpoint first" in done.stdout + done.stderr
