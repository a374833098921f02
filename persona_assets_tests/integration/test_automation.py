"""The daemon at work: a backfill of carried-over cells, and what follows from it by itself."""

from __future__ import annotations

import time

from persona_assets.asset_table import JOBS
from persona_assets.reporting.so_far import SO_FAR
from persona_assets.store import Ref
from persona_assets_tests.integration.webserver import launch

CONTRAST = Ref("contrast_estimate", "generic_cot-garbage_cot.source_loss")
BACKFILLS = """
{ partitionBackfillsOrError { ... on PartitionBackfills { results {
  id title partitionSetName assetSelection { path } numPartitions
  runs(limit: 20) { runId assetSelection { path } tags { key value } }
} } } }"""
EVENTS = """
query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on ExecutionStepOutputEvent { metadataEntries {
    label ... on IntMetadataEntry { intValue } ... on MarkdownMetadataEntry { mdStr } } }
} } } }"""


def wait_for(project, what, seconds: float) -> None:
    """Wait until ``what`` holds, a function without arguments."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, (project.data / "dagster-dev.log").read_text()[-4000:]
        time.sleep(0.5)


def test_a_backfill_of_carried_over_cells_and_all_that_follows(own_project, webserver):
    project, store = own_project, own_project.store
    whole, part, *others = [cell.key for cell in project.study.cells_of("carry_over")]
    chain = JOBS["cell"].assets
    lost = [Ref(asset, whole) for asset in chain] + [Ref("cell_diagnostics", part)]
    kept = [ref for cell in (part, *others) for a in chain if (ref := Ref(a, cell)) not in lost]
    before = {ref: store.landed(ref) for ref in (*kept, *lost, CONTRAST, Ref("report"))}
    for ref in (*lost, CONTRAST, Ref("report")):
        (store.folder(ref) / "manifest.json").unlink()

    run_id, status = launch(webserver, "carry_over_backfill", None)
    assert status == "SUCCESS"
    wait_for(project, lambda: all(store.manifest(ref) for ref in (SO_FAR, *lost)), 180)
    page = store.path(SO_FAR, "so_far.html").read_text("utf-8")
    assert "INCOMPLETE" in page
    assert f"<code>{whole}</code>" in page

    # Exactly the two cells, in one run each, which has kept what was up to date.
    (backfill,) = webserver.ask(BACKFILLS)["partitionBackfillsOrError"]["results"]
    assert backfill["title"] == "2 carried-over cells of tiny"
    made = {
        (tag["value"], frozenset(asset["path"][-1] for asset in run["assetSelection"]))
        for run in backfill["runs"]
        for tag in run["tags"]
        if tag["key"] == "dagster/partition"
    }
    assert made == {(whole, frozenset(chain)), (part, frozenset(chain))}
    assert len(backfill["runs"]) == 2
    assert {ref: store.landed(ref) for ref in kept} == {ref: before[ref] for ref in kept}
    ids = {run["runId"] for run in backfill["runs"]}
    assert {store.landed(ref).provenance.run_id for ref in lost} == ids
    metadata = {
        entry["label"]: entry.get("intValue", entry.get("mdStr"))
        for event in webserver.ask(EVENTS, id=run_id)["logsForRun"]["events"]
        for entry in event.get("metadataEntries", ())
    }
    assert metadata["cells"] == len(others) + 2
    assert metadata["requested"] == 2
    assert f"/runs/b/{backfill['id']}" in metadata["backfill"]

    # The rest comes by itself: the contrast, the report, and the page that says so.
    wait_for(project, lambda: store.manifest(Ref("report")), 180)
    assert store.landed(CONTRAST).data_version == before[CONTRAST].data_version
    assert store.landed(Ref("report")).provenance.run_id != before[Ref("report")].provenance.run_id
    wait_for(project, lambda: store.landed(SO_FAR).summary["complete"], 180)
    version = store.landed(Ref("report")).version
    assert f"../../report/{version}/report.html" in store.path(SO_FAR, "so_far.html").read_text()
    assert set(project.states().values()) == {"fresh"}
