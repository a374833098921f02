"""The job that asks for a backfill of the carried-over cells, over a store landed by fiat."""

from __future__ import annotations

import dagster as dg
import pytest
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BulkActionStatus

from persona_assets.asset_table import JOBS
from persona_assets.definitions import study_definitions
from persona_assets.run_lock import only_run
from persona_assets.store import Ref
from persona_assets_tests.ticks import Ticks, cells_landed, project, ticks

__all__ = ["cells_landed", "project", "ticks"]

CARRIED = (
    "librarian.generic_cot.42",
    "comedian.generic_cot.42",
    "librarian.persona_cot.42",
    "comedian.persona_cot.42",
    "librarian.persona_cot_correct.42",
)


def backfill(ticks: Ticks) -> dict[str, object]:
    """Run the job; what its output says.

    Raises:
        dg.Failure: it refused.
    """
    job = ticks.definitions.resolve_job_def("carry_over_backfill")
    done = job.execute_in_process(instance=ticks.instance)
    (output,) = (e.event_specific_data for e in done.all_events if e.is_successful_output)
    return {name: value.value for name, value in output.metadata.items()}


def test_carried_over_cells_are_one_contiguous_selection(mini, length_matched):
    for study in (mini, length_matched):
        keys = (
            study_definitions(study)
            .get_assets_def(dg.AssetKey([study.name, "cell_outcomes"]))
            .partitions_def.get_partition_keys()
        )
        carried = [cell.key for cell in study.cells_of("carry_over")]
        assert len(carried) == 27
        assert list(keys[keys.index(carried[0]) :]) == carried


def test_the_backfill_is_of_exactly_the_cells_that_are_not_up_to_date(project, ticks):
    assert backfill(ticks) == {"cells": 5, "up_to_date": 5, "requested": 0}
    assert ticks.instance.get_backfills() == []
    project.remove(Ref("cell_diagnostics", CARRIED[1]), Ref("checkpoint", CARRIED[3]))
    said = backfill(ticks)
    (requested,) = ticks.instance.get_backfills()
    assert said == {
        "cells": 5,
        "up_to_date": 3,
        "requested": 2,
        "backfill": f"[{requested.backfill_id}](/runs/b/{requested.backfill_id})",
        "cells_requested": [CARRIED[1], CARRIED[3]],
    }
    target = requested.asset_backfill_data.target_subset
    assert {
        key.path[-1]: set(subset.get_partition_keys())
        for key, subset in target.partitions_subsets_by_asset_key.items()
    } == {asset: {CARRIED[1], CARRIED[3]} for asset in JOBS["cell"].assets}


def test_the_backfill_names_all_that_is_to_be_materialized_first(project, ticks):
    rationales = [Ref("rationales", key.rpartition(".")[0]) for key in CARRIED]
    project.remove(
        *rationales, Ref("prior_checkpoint", CARRIED[2]), Ref("prior_accuracies", CARRIED[0])
    )
    with pytest.raises(dg.Failure) as refused:
        backfill(ticks)
    text = refused.value.description
    assert text.startswith("5 carried-over cells cannot be made yet:\n  - ")
    assert f"prior_checkpoint[{CARRIED[2]}] has not landed" in text
    assert text.endswith(
        "Materialize first, in this order: 5 partitions of rationales (librarian.generic_cot, "
        "comedian.generic_cot, librarian.persona_cot, …), 5 partitions of prior_checkpoint "
        "(librarian.generic_cot.42, comedian.generic_cot.42, librarian.persona_cot.42, …) and 5 "
        "partitions of prior_accuracies (librarian.generic_cot.42, comedian.generic_cot.42, "
        "librarian.persona_cot.42, …)."
    )
    project.remove(Ref("question_bank"))
    with pytest.raises(dg.Failure, match=r"  - question_bank has not landed"):
        backfill(ticks)
    assert ticks.instance.get_backfills() == []


def test_nothing_is_made_twice_at_a_time(project, ticks):
    project.remove(Ref("checkpoint", CARRIED[0]))
    with only_run(project.store), pytest.raises(dg.Failure, match="of study tiny is at work"):
        backfill(ticks)
    backfill(ticks)
    (requested,) = ticks.instance.get_backfills()
    with pytest.raises(dg.Failure, match=f"backfill {requested.backfill_id} is at work"):
        backfill(ticks)
    ticks.instance.update_backfill(requested.with_status(BulkActionStatus.CANCELED))
    assert backfill(ticks)["requested"] == 1


def test_a_range_of_a_cells_chain_reaches_every_asset_of_it(project, ticks):
    """Dagster follows a backfill of several assets down the edges from the first of them."""
    nodes = ticks.definitions.get_repository_def().asset_graph
    data = AssetBackfillData.from_asset_partitions(
        asset_graph=nodes,
        partition_names=list(CARRIED),
        asset_selection=[dg.AssetKey(["tiny", asset]) for asset in JOBS["cell"].assets],
        dynamic_partitions_store=ticks.instance,
        backfill_start_timestamp=0.0,
        all_partitions=False,
    )
    subsets = data.target_subset.partitions_subsets_by_asset_key
    assert {key.path[-1]: set(s.get_partition_keys()) for key, s in subsets.items()} == {
        asset: set(CARRIED) for asset in JOBS["cell"].assets
    }
