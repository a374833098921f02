"""What Dagster sees: light imports, valid definitions, and a cell materialized from the UI."""

from __future__ import annotations

import subprocess
import sys

from persona_assets.store import Ref
from persona_assets.training.audits import AUDITS
from persona_assets_tests.integration.webserver import launch

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


def test_a_single_cell_materializes_from_the_ui(own_project, webserver):
    """From inputs to outcomes in three runs; the base model alone is left from before."""
    chain = ("training_dataset", "checkpoint", "cell_outcomes")
    condition = CELL.rpartition(".")[0]
    made = [Ref(asset, CELL) for asset in chain]
    made += [Ref("rationales", condition), Ref("tokenizer"), Ref("question_bank")]
    for ref in made:
        (own_project.store.folder(ref) / "manifest.json").unlink()
    assert launch(webserver, "cell", CELL, *chain)[1] == "FAILURE"
    assert launch(webserver, "inputs", None, "tokenizer", "question_bank")[1] == "SUCCESS"
    assert launch(webserver, "rationales", condition, "rationales")[1] == "SUCCESS"
    run_id, status = launch(webserver, "cell", CELL, *chain)
    assert status == "SUCCESS"
    assert own_project.store.landed(Ref("cell_outcomes", CELL)).provenance.run_id == run_id
    node = webserver.ask(CHECKS, key={"path": ["tiny", "training_dataset"]}, partition=CELL)[
        "assetNodeOrError"
    ]
    assert [m["runId"] for m in node["assetMaterializations"]] == [run_id]
    checks = {c["name"] for c in node["assetChecksOrError"]["checks"]}
    assert checks == set(AUDITS)
