"""What Dagster sees and does: light imports, valid definitions, cells from the UI, backfills."""

from __future__ import annotations

import ipaddress
import subprocess
import sys
import time

import pytest

from persona_assets.asset_table import JOBS
from persona_assets.reporting.so_far import SO_FAR
from persona_assets.store import Ref
from persona_assets.training.audits import AUDITS
from persona_assets_tests.integration.webserver import Webserver, backfill, launch

CELL = "librarian.garbage_cot.42"


def test_importing_the_definitions_imports_nothing_heavy():
    code = (
        "import sys; from persona_assets.definitions import mini, length_matched;"
        "print([m for m in ('torch', 'transformers', 'peft', 'vllm', 'matplotlib', 'wandb')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_both_studies_are_valid_code_locations():
    from persona_assets.definitions import length_matched, mini

    for definitions, prior in ((mini, True), (length_matched, False)):
        repository = definitions.get_repository_def()
        names = {key.path[-1] for key in repository.asset_graph.get_all_asset_keys()}
        assert ("prior_checkpoint" in names) == prior
        assert {"cell_outcomes", "contrast_estimate", "report"} <= names
        jobs = {job.name for job in repository.get_all_jobs()}
        assert {"inputs", "rationales", "baseline", "cell", "contrasts", "aggregates"} <= jobs


def test_partition_mappings_say_what_the_graph_says():
    import dagster as dg

    from persona_assets.definitions import mini

    graph = mini.get_repository_def().asset_graph
    contrast = "persona_cot-garbage_cot.bystander_leakage"
    key = dg.AssetKey(["mini", "contrast_estimate"])
    parent = dg.AssetKey(["mini", "cell_outcomes"])
    mapping = graph.get(key).partition_mappings[parent]
    upstream = mapping.get_upstream_mapped_partitions_result_for_partitions(
        graph.get(key).partitions_def.subset_with_partition_keys([contrast]),
        graph.get(key).partitions_def,
        graph.get(parent).partitions_def,
    )
    keys = set(upstream.partitions_subset.get_partition_keys())
    assert len(keys) == 24
    assert {k.split(".")[1] for k in keys} == {"persona_cot", "garbage_cot"}


CHECKS = """
query($key: AssetKeyInput!, $partition: String!) {
  assetNodeOrError(assetKey: $key) { ... on AssetNode {
    assetChecksOrError { ... on AssetChecks { checks {
      name
      executionForLatestMaterialization { status }
    } } }
    assetMaterializations(partitions: [$partition], limit: 1) { runId partition }
  } }
}"""


ERRORS = """
query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
  ... on ExecutionStepFailureEvent { stepKey error { message causes { message } } }
} } } }
"""

CHECKED = """
query($key: AssetKeyInput!, $check: String!, $partition: String!) {
  assetCheckExecutions(assetKey: $key, checkName: $check, partition: $partition, limit: 1) {
    runId partition status evaluation { success severity description }
  }
  assetNodeOrError(assetKey: $key) { ... on AssetNode {
    assetChecksOrError { ... on AssetChecks { checks {
      name
      blocking
      partitionStatuses {
        ... on AssetCheckDefaultPartitionStatuses { succeededPartitions failedPartitions }
      }
    } } }
  } }
}
"""


@pytest.fixture(scope="module")
def served(project, tmp_path_factory):
    """A copy of the complete tiny study for this module's tests, each with cells of its own."""
    return project.copy(tmp_path_factory.mktemp("served") / "data")


@pytest.fixture(scope="module")
def webserver(served):
    with Webserver(served) as server:
        yield server


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


def test_a_backfill_of_carried_over_cells_and_all_that_follows(served, webserver):
    """The daemon at work."""
    store = served.store
    whole, part, *others = [cell.key for cell in served.study.cells_of("carry_over")]
    chain = JOBS["cell"].assets
    lost = [Ref(asset, whole) for asset in chain] + [Ref("cell_diagnostics", part)]
    kept = [ref for cell in (part, *others) for a in chain if (ref := Ref(a, cell)) not in lost]
    before = {ref: store.landed(ref) for ref in (*kept, *lost, CONTRAST, Ref("report"))}
    for ref in (*lost, CONTRAST, Ref("report")):
        (store.folder(ref) / "manifest.json").unlink()

    run_id, status = launch(webserver, "carry_over_backfill", None)
    assert status == "SUCCESS"
    wait_for(served, lambda: all(store.manifest(ref) for ref in (SO_FAR, *lost)), 180)
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
    wait_for(served, lambda: store.manifest(Ref("report")), 180)
    assert store.landed(CONTRAST).data_version == before[CONTRAST].data_version
    assert store.landed(Ref("report")).provenance.run_id != before[Ref("report")].provenance.run_id
    wait_for(served, lambda: store.landed(SO_FAR).summary["complete"], 180)
    version = store.landed(Ref("report")).version
    assert f"../../report/{version}/report.html" in store.path(SO_FAR, "so_far.html").read_text()
    assert set(served.states().values()) == {"fresh"}


def forced(*assets: str) -> dict:
    """The run config that makes the assets again though they are up to date."""
    return {"ops": {f"tiny__{asset}": {"config": {"force": True}} for asset in assets}}


def refusal(webserver: Webserver, run_id: str) -> str:
    """What the run's one failed step said."""
    (event,) = [e for e in webserver.ask(ERRORS, id=run_id)["logsForRun"]["events"] if e]
    return event["error"]["message"] + "".join(c["message"] for c in event["error"]["causes"])


def test_a_single_cell_materializes_from_the_ui(served, webserver):
    """From inputs to outcomes in three runs; the base model alone is left from before."""
    chain = ("training_dataset", "checkpoint", "cell_outcomes")
    condition = CELL.rpartition(".")[0]
    made = [Ref(asset, CELL) for asset in chain]
    made += [Ref("rationales", condition), Ref("tokenizer"), Ref("question_bank")]
    for ref in made:
        (served.store.folder(ref) / "manifest.json").unlink()
    assert launch(webserver, "cell", CELL, *chain)[1] == "FAILURE"
    assert launch(webserver, "inputs", None, "tokenizer", "question_bank")[1] == "SUCCESS"
    assert launch(webserver, "rationales", condition, "rationales")[1] == "SUCCESS"
    run_id, status = launch(webserver, "cell", CELL, *chain)
    assert status == "SUCCESS"
    assert served.store.landed(Ref("cell_outcomes", CELL)).provenance.run_id == run_id
    node = webserver.ask(CHECKS, key={"path": ["tiny", "training_dataset"]}, partition=CELL)[
        "assetNodeOrError"
    ]
    assert [m["runId"] for m in node["assetMaterializations"]] == [run_id]
    checks = {c["name"] for c in node["assetChecksOrError"]["checks"]}
    assert checks == set(AUDITS)
    # Once more: kept as it is, but for what the launchpad says.
    again, status = launch(webserver, "cell", CELL, *chain, config=forced("training_dataset"))
    assert status == "SUCCESS"
    made_by = [served.store.landed(Ref(asset, CELL)).provenance.run_id for asset in chain]
    assert made_by == [again, run_id, run_id]


def test_what_is_served_is_served_on_loopback_only(webserver):
    """By webserver, daemon and code server, after runs: no other machine is let in."""
    listening = webserver.listening()
    assert "webserver" in listening["127.0.0.1", webserver.port]
    elsewhere = {
        place: command
        for place, command in listening.items()
        if not ipaddress.ip_address(place[0]).is_loopback
    }
    assert elsewhere == {}


def spoil(project, condition: str) -> None:
    """Land rationales that argue for a right letter where a wrong one is prescribed.

    As if their writer had made them so: up to date, and none of their own checks looks at it.
    """
    ref = Ref("rationales", condition)
    manifest, frame = project.store.landed(ref), project.store.frame(ref)
    with project.store.draft(ref) as draft:
        wrong = frame.with_columns(target_letter="correct_letter")
        wrong.write_parquet(draft / "rationales.parquet")
        project.store.land(
            ref,
            draft,
            provenance=manifest.provenance,
            audits=manifest.audits,
            summary=manifest.summary,
        )


def test_consumers_refuse_a_failed_partition_across_runs(served, webserver):
    """A range of datasets is backfilled, one fails a blocking check; then their checkpoints."""
    failed, *good = (
        f"{condition}.42"
        for condition in ("comedian.scrambled_english_cot", "comedian.contradicting_cot")
    )
    spoil(served, failed.removesuffix(".42"))
    for cell in (failed, *good):
        (served.store.folder(Ref("checkpoint", cell)) / "manifest.json").unlink()
    config = forced("training_dataset")
    datasets = backfill(webserver, ["training_dataset"], [failed, *good], runConfigData=config)
    assert {cell: status for cell, (_, status) in datasets.items()} == {
        failed: "FAILURE",
        **dict.fromkeys(good, "SUCCESS"),
    }
    key = {"path": ["tiny", "training_dataset"]}
    for cell, passed in ((failed, False), *((cell, True) for cell in good)):
        seen = webserver.ask(CHECKED, key=key, check="target_letters", partition=cell)
        (execution,) = seen["assetCheckExecutions"]
        assert execution["runId"] == datasets[cell][0]
        assert execution["partition"] == cell
        assert execution["evaluation"]["success"] == passed
        assert execution["status"] == ("SUCCEEDED" if passed else "FAILED")
    checks = seen["assetNodeOrError"]["assetChecksOrError"]["checks"]
    (check,) = (check for check in checks if check["name"] == "target_letters")
    assert check["blocking"]
    assert check["partitionStatuses"]["failedPartitions"] == [failed]
    assert set(good) < set(check["partitionStatuses"]["succeededPartitions"])

    checkpoints = backfill(webserver, ["checkpoint"], [failed, *good])
    assert {cell: status for cell, (_, status) in checkpoints.items()} == {
        failed: "FAILURE",
        **dict.fromkeys(good, "SUCCESS"),
    }
    said = refusal(webserver, checkpoints[failed][0])
    assert f"checkpoint[{failed}] cannot be made yet" in said
    assert f"training_dataset[{failed}] failed its blocking checks: " in said
    assert "target_letters" in said
    assert f"Materialize partition {failed} of training_dataset first." in said
    assert served.store.manifest(Ref("checkpoint", failed)) is None
    for cell in good:
        landed = served.store.landed(Ref("checkpoint", cell))
        assert landed.provenance.run_id == checkpoints[cell][0]
