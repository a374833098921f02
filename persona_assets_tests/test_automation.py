"""The sensors tick by tick, over a store that is landed by fiat."""

from __future__ import annotations

import shutil

import dagster as dg
import pytest
from dagster._core.events import DagsterEventType
from dagster._core.storage.tags import GRPC_INFO_TAG

from persona_assets import automation
from persona_assets.asset_table import JOBS
from persona_assets.audit import Audit, audit
from persona_assets.automation import MADE_FROM, MAKES
from persona_assets.environment import WORKER_TAG
from persona_assets.freshness import Freshness
from persona_assets.reporting.so_far import SO_FAR, so_far
from persona_assets.run_lock import AlreadyRunning, is_running, only_run
from persona_assets.store import Provenance, Ref
from persona_assets.study import StudyError
from persona_assets_tests.fabricated import Fabricated
from persona_assets_tests.ticks import AGGREGATES, cells_landed, project, ticks

__all__ = ["cells_landed", "project", "ticks"]

CELL = "librarian.garbage_cot.42"
OF_CELL = tuple(Ref(asset, CELL) for asset in JOBS["cell"].assets)
name_of = "contrast_estimate[{}]".format


def names(requests) -> set[str]:
    return {request.tags[MAKES] for request in requests}


def selected(request: dg.RunRequest) -> set[str]:
    return {key.path[-1] for key in request.asset_selection}


def contrasts_of(project: Fabricated, arm: str) -> set[str]:
    return {name_of(c.key) for c in project.graph.study.contrast_list if arm in (c.a, c.b)}


def every_contrast(project: Fabricated) -> set[str]:
    return {name_of(contrast.key) for contrast in project.graph.study.contrast_list}


def test_a_contrast_is_requested_exactly_when_the_last_of_its_cells_lands(project, ticks):
    project.remove(*OF_CELL)
    others = every_contrast(project) - contrasts_of(project, "garbage_cot")
    requests = ticks.tick()
    assert names(requests) == others
    for request in requests:
        assert request.job_name == "contrasts"
        assert request.tags[MAKES] == name_of(request.partition_key)
        assert request.tags["dagster/partition"] == request.partition_key
        assert selected(request) == {"contrast_estimate"}
        ticks.succeed(ticks.start(request))
    for ref in OF_CELL:
        assert ticks.tick() == []
        assert f"{ref} has not landed" in ticks.reason
        project.land(ref)
    assert names(ticks.tick()) == contrasts_of(project, "garbage_cot")


def test_what_landed_before_the_first_tick_is_carried_through_to_the_report(project, ticks):
    assert ticks.settle() == [every_contrast(project), {"aggregates"}]
    states = Freshness(project.graph, project.store).state
    assert {states(ref) for ref in AGGREGATES} == {"fresh"}
    assert "aggregates is up to date" in ticks.reason


def test_a_failed_check_blocks_and_an_unverifiable_one_does_not(project, ticks):
    cell = Ref("cell_outcomes", CELL)
    unknown = Audit("coverage", "unverifiable", observed="?", threshold="0", remedy="none")
    project.land(cell, audits=[unknown], content="again")
    project.land(Ref("cell_diagnostics", CELL))
    assert names(ticks.tick()) == every_contrast(project)
    wrong = audit("coverage", False, observed="1 row", threshold="2", remedy="mend")
    project.land(cell, audits=[wrong], content="again")
    assert names(ticks.tick()) == every_contrast(project) - contrasts_of(project, "garbage_cot")


def test_a_failed_check_of_a_contrasts_diagnostics_blocks_it(project, ticks):
    wrong = audit("adapter_effect", False, observed="0", threshold="1", remedy="mend")
    project.land(Ref("cell_diagnostics", CELL), audits=[wrong])
    assert names(ticks.tick()) == every_contrast(project) - contrasts_of(project, "garbage_cot")


def test_a_changed_study_file_asks_for_what_it_concerns(project, ticks):
    ticks.settle()
    project.edit("title: Miniature", "title: Small")
    (request,) = ticks.tick()
    assert selected(request) == {"number_ledger", "warehouse", "report"}
    ticks.succeed(ticks.start(request))
    assert ticks.tick() == []
    project.edit("resamples: 2000", "resamples: 1000")
    assert ticks.settle() == [every_contrast(project), {"aggregates"}]


def test_what_failed_is_not_asked_for_again_until_something_has_changed(project, ticks):
    first, *rest = ticks.tick()
    run = ticks.start(first)
    for request in rest:
        ticks.succeed(ticks.start(request))
    ticks.end(run)
    assert ticks.tick() == []
    assert f"failed in run {run.run_id}" in ticks.reason
    contrast = project.graph.study.contrast(first.partition_key)
    cell = project.graph.study.contrast_cells(contrast)[0].key
    project.land(Ref("cell_outcomes", cell), content="other rows")
    assert first.tags[MAKES] not in names(ticks.tick())  # its diagnostics are stale
    project.land(Ref("cell_diagnostics", cell))
    assert first.tags[MAKES] in names(ticks.tick())


def test_what_a_failed_run_did_land_does_not_count_as_a_change(project, ticks):
    for request in ticks.tick():
        ticks.succeed(ticks.start(request))
    (request,) = ticks.tick()
    assert request.job_name == "aggregates"
    assert selected(request) == {ref.asset for ref in AGGREGATES}
    run = ticks.start(request)
    project.land(Ref("multiplicity"), Ref("loss_matrix"), run_id=run.run_id)
    ticks.end(run)
    assert ticks.tick() == []
    assert f"aggregates failed in run {run.run_id}" in ticks.reason
    project.land(Ref("exploratory_estimates"))  # a person has mended what failed
    (again,) = ticks.tick()
    assert selected(again) == selected(request) - {
        "multiplicity",
        "loss_matrix",
        "exploratory_estimates",
    }
    ticks.succeed(ticks.start(again))
    assert ticks.tick() == []


def test_a_retry_of_a_failed_run_counts_as_the_same_run(project, ticks):
    for request in ticks.tick():
        ticks.succeed(ticks.start(request))
    (request,) = ticks.tick()
    first = ticks.start(request)
    project.land(Ref("multiplicity"), run_id=first.run_id)
    ticks.end(first)
    retry = ticks.run(
        "aggregates",
        request.asset_selection,
        tags=request.tags,
        parent_run_id=first.run_id,
        root_run_id=first.run_id,
    )
    assert ticks.tick() == []
    assert f"being made by run {retry.run_id}" in ticks.reason
    ticks.end(retry)
    assert ticks.tick() == []
    assert f"failed in run {retry.run_id}" in ticks.reason


def test_a_run_whose_worker_died_is_left_to_its_retry(project, ticks):
    request, *rest = ticks.tick()
    for other in rest:
        ticks.succeed(ticks.start(other))
    run = ticks.start(request)
    ticks.instance.add_run_tags(run.run_id, {"dagster/will_retry": "true"})
    ticks.end(run)
    project.edit("resamples: 2000", "resamples: 1000")  # would else ask for it again at once
    assert names(ticks.tick()) == every_contrast(project) - {request.tags[MAKES]}
    project.edit("resamples: 1000", "resamples: 2000")
    assert ticks.tick() == []
    assert f"about to be tried again: the worker of run {run.run_id} died" in ticks.reason
    ticks.instance.add_run_tags(run.run_id, {"dagster/auto_retry_run_id": "another"})
    assert ticks.tick() == []
    assert f"failed in run {run.run_id}" in ticks.reason


def test_cells_that_land_while_a_report_is_made_are_picked_up(project, ticks):
    for request in ticks.tick():
        ticks.succeed(ticks.start(request))
    (request,) = ticks.tick()
    report = ticks.start(request)
    project.land(*OF_CELL, content="other rows")
    requests = ticks.tick()
    assert names(requests) == contrasts_of(project, "garbage_cot")
    for again in requests:
        ticks.succeed(ticks.start(again))
    assert ticks.tick() == []
    assert f"aggregates is being made by run {report.run_id}" in ticks.reason
    ticks.end(report, DagsterEventType.RUN_SUCCESS)
    assert names(ticks.tick()) == {"aggregates"}


def test_nothing_is_asked_for_while_somebody_else_makes_it(project, ticks):
    contrast = project.graph.study.contrast_list[0].key
    key = dg.AssetKey(["tiny", "contrast_estimate"])
    run = ticks.run("contrasts", [key], tags={"dagster/partition": contrast})
    assert names(ticks.tick()) == every_contrast(project) - {name_of(contrast)}
    ticks.end(run)
    whole = ticks.run("contrasts", None, tags={"dagster/partition": contrast})
    assert names(ticks.tick()) == every_contrast(project) - {name_of(contrast)}
    ticks.end(whole)
    # Left by a killed `persona-assets run`: nobody is at it.
    lost = {"dagster/partition": contrast, WORKER_TAG: "1"}
    ticks.run("contrasts", [key], tags=lost)
    assert names(ticks.tick()) == every_contrast(project)
    # Of another machine, whose lock may be another: that one may be at it.
    elsewhere = ticks.run("contrasts", [key], tags=lost | {WORKER_TAG: "1@elsewhere"})
    assert names(ticks.tick()) == every_contrast(project) - {name_of(contrast)}
    ticks.end(elsewhere)
    # Re-executed from the interface, with all of its parent's tags.
    ticks.run("contrasts", [key], tags=lost | {GRPC_INFO_TAG: "{}"})
    assert names(ticks.tick()) == every_contrast(project) - {name_of(contrast)}


def test_the_sensor_rests_while_a_run_of_the_study_is_at_work(project, ticks):
    with only_run(project.store):
        assert ticks.tick() == []
        assert "`persona-assets run` of study tiny is at work" in ticks.reason
    assert names(ticks.tick()) == every_contrast(project)


def test_the_run_lock_is_seen_and_refused_from_elsewhere(project):
    assert not is_running(project.store)
    with only_run(project.store):
        assert is_running(project.store)
        with (
            pytest.raises(AlreadyRunning, match="of study tiny is at work"),
            only_run(project.store),
        ):
            pass
    assert not is_running(project.store)


def test_what_is_lost_after_it_was_made_is_made_again(project, ticks):
    ticks.settle()
    for _ in range(3):
        project.remove(Ref("report"))
        (request,) = ticks.tick()
        assert selected(request) == {"report"}
        ticks.succeed(ticks.start(request))
    assert ticks.tick() == []


def test_runs_that_read_other_code_do_not_loop(project, ticks, monkeypatch):
    """A code location that was loaded before an edit sees what its workers land as stale."""
    ticks.settle()
    raised = automation.Graph

    def older(study):
        graph = raised(study)
        object.__setattr__(graph.assets["report"], "code_version", "0")
        return graph

    monkeypatch.setattr(automation, "Graph", older)
    asked = 0
    while requests := ticks.tick():
        asked += 1
        assert asked <= 2
        (request,) = requests
        ticks.succeed(ticks.start(request))
    assert asked == 2
    assert "other code than this code location" in ticks.reason


def test_a_grid_that_dagster_does_not_know_is_named(project, ticks):
    project.edit("seeds: [42]", "seeds: [42, 137]")
    with pytest.raises(automation.GridChanged, match=r"partitions of training_dataset.*Reload"):
        ticks.tick()


def test_a_study_file_that_cannot_be_used_fails_the_tick(project, ticks):
    project.edit("resamples: 2000", "resamples: few")
    with pytest.raises(StudyError, match=r"inference\.resamples"):
        ticks.tick()


def land_page(project: Fabricated, run_id: str) -> None:
    """Land the page as the asset does."""
    page = so_far(Freshness(project.graph, project.store))
    with project.store.draft(SO_FAR) as draft:
        (draft / "so_far.html").write_text("page")
        project.store.land(SO_FAR, draft, provenance=Provenance(run_id, page.inputs, "hash"))


def test_the_page_follows_what_lands(project, ticks):
    (request,) = ticks.tick("keep_so_far")
    assert (request.job_name, request.partition_key) == ("so_far", None)
    run = ticks.start(request)
    land_page(project, run.run_id)
    # Lands after the page was read, while its run is still at work.
    project.land(Ref("cell_outcomes", CELL), content="other rows")
    assert ticks.tick("keep_so_far") == []
    assert f"so_far is being made by run {run.run_id}" in ticks.reason
    ticks.end(run, DagsterEventType.RUN_SUCCESS)
    (request,) = ticks.tick("keep_so_far")
    run = ticks.start(request)
    land_page(project, run.run_id)
    ticks.end(run, DagsterEventType.RUN_SUCCESS)
    assert ticks.tick("keep_so_far") == []
    assert ticks.reason == "the page says what is there"
    project.edit("batch_size: 256", "batch_size: 128")  # no evaluation is up to date any more
    with only_run(project.store):
        assert len(ticks.tick("keep_so_far")) == 1


def test_a_page_that_failed_waits_for_a_change(project, ticks):
    (request,) = ticks.tick("keep_so_far")
    ticks.end(ticks.start(request))
    assert ticks.tick("keep_so_far") == []
    assert "so_far failed in run" in ticks.reason
    project.remove(Ref("cell_diagnostics", CELL))
    (again,) = ticks.tick("keep_so_far")
    assert again.tags[MADE_FROM] != request.tags[MADE_FROM]


def test_there_is_no_page_before_the_first_evaluation(project, ticks):
    shutil.rmtree(project.store.root)
    assert ticks.tick("keep_so_far") == []
    assert ticks.reason == "nothing of study tiny has been evaluated yet"
    assert ticks.tick() == []
