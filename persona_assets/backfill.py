"""The job ``carry_over_backfill``: the cell chain of exactly the carried-over cells.

Dagster has no job over a part of its assets' partitions. So the job's one step asks the instance
for a backfill of those cells, which the daemon runs, cell by cell, as it does for one that is asked
for in the interface.
"""

import dagster as dg
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.execution.backfill import (
    BULK_ACTION_TERMINAL_STATUSES,
    BulkActionsFilter,
    BulkActionStatus,
    PartitionBackfill,
)
from dagster._core.storage.tags import PRIORITY_TAG
from dagster._core.utils import make_new_backfill_id
from dagster._time import get_current_timestamp

from persona_assets.asset_table import JOBS
from persona_assets.automation import Look
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.naming import listed
from persona_assets.partitions import partitions_definition
from persona_assets.release import release_read
from persona_assets.run_lock import is_running
from persona_assets.store import Ref, Store

NAME = "carry_over_backfill"


def carry_over_backfill(graph: Graph, store: Store) -> dg.JobDefinition:
    """The job of one study, which has carried-over cells."""
    study = graph.study
    cells = study.cells_of("carry_over")

    @dg.op(
        name="request_backfill",
        out=dg.Out(dg.Nothing),
        description=f"Asks for a backfill of those of the {len(cells)} carried-over cells that are "
        "not up to date.",
    )
    def request(context: dg.OpExecutionContext):
        release_read(graph, store)  # of runs that were killed before they could
        freshness = Freshness(graph, store).read_ahead()
        todo = [
            cell.key
            for cell in cells
            if any(freshness.state(Ref(a, cell.key)) != "fresh" for a in JOBS["cell"].assets)
        ]
        counts = {"cells": len(cells), "up_to_date": len(cells) - len(todo), "requested": len(todo)}
        if not todo:
            context.log.info(f"all {len(cells)} carried-over cells are up to date")
            context.add_output_metadata(counts)
            return
        _refuse_if_busy(context.instance, store)
        chain = [Ref(asset, key) for key in todo for asset in JOBS["cell"].assets]
        making = Look(context.instance, freshness).being_made
        if runs := sorted({making[ref] for ref in chain if ref in making}):
            raise dg.Failure(
                f"some of these cells are being made by run {', '.join(runs)}. Wait for it, or "
                "cancel it.",
                allow_retries=False,
            )
        if waits := freshness.waits_for(chain):
            raise NotReady(len(todo), waits)
        backfill_id = _request(context, graph, todo)
        where = f"[{backfill_id}](/runs/b/{backfill_id})"
        context.log.info(f"backfill {backfill_id} makes {len(todo)} cells: {', '.join(todo)}")
        context.add_output_metadata(
            {**counts, "backfill": dg.MetadataValue.md(where), "cells_requested": todo}
        )

    @dg.job(
        name=NAME,
        executor_def=dg.in_process_executor,
        description=f"{JOBS['cell'].description[:-1]}, for the {len(cells)} carried-over cells: "
        "asks for a backfill of those that are not up to date (see Runs, Backfills).",
        tags={"study": study.name},
    )
    def job():
        request()

    return job


class NotReady(dg.Failure):
    """What the cells are made from is missing; names all that is to be materialized first."""

    def __init__(self, cells: int, waits: dict[Ref, str]):
        by_asset: dict[str, list[Ref]] = {}
        for ref in waits:
            by_asset.setdefault(ref.asset, []).append(ref)
        first = listed([_named(asset, refs) for asset, refs in by_asset.items()])
        reasons = "\n".join(f"  - {why}" for why in list(waits.values())[:10])
        more = f"\n  - and {len(waits) - 10} more" if len(waits) > 10 else ""
        super().__init__(
            f"{cells} carried-over cells cannot be made yet:\n{reasons}{more}\n"
            f"Materialize first, in this order: {first}.",
            allow_retries=False,
        )


def _named(asset: str, refs: list[Ref]) -> str:
    if len(refs) == 1:
        return str(refs[0])
    shown = ", ".join(str(ref.key) for ref in refs[:3])
    return f"{len(refs)} partitions of {asset} ({shown}{', …' if len(refs) > 3 else ''})"


def _refuse_if_busy(instance: dg.DagsterInstance, store: Store) -> None:
    """Fail while somebody else makes these cells: everything would be done twice."""
    if is_running(store):
        raise dg.Failure(
            f"a `persona-assets run` of study {store.study} is at work. Wait for it, or stop it.",
            allow_retries=False,
        )
    unfinished = [s for s in BulkActionStatus if s not in BULK_ACTION_TERMINAL_STATUSES]
    for other in instance.get_backfills(BulkActionsFilter(statuses=unfinished)):
        if other.tags.get("study") == store.study and other.tags.get("job") == NAME:
            raise dg.Failure(
                f"backfill {other.backfill_id} is at work on these cells. Wait for it, or cancel "
                "it (Runs, Backfills).",
                allow_retries=False,
            )


def _request(context: dg.OpExecutionContext, graph: Graph, cells: list[str]) -> str:
    """Ask the instance for a backfill of exactly these cells; returns its id.

    All assets of a cell go into it, also those that are up to date, which their run keeps: of
    assets with unlike partitions Dagster would make separate runs.
    """
    study = graph.study.name
    subsets = {
        dg.AssetKey([study, asset]): partitions_definition(
            graph.assets[asset]
        ).subset_with_partition_keys(cells)
        for asset in JOBS["cell"].assets
    }
    backfill_id = make_new_backfill_id()
    context.instance.add_backfill(
        PartitionBackfill.from_asset_graph_subset(
            backfill_id=backfill_id,
            backfill_timestamp=get_current_timestamp(),
            # A click on one cell goes before the cells that wait here.
            tags={"study": study, "job": NAME, PRIORITY_TAG: "-1"},
            dynamic_partitions_store=context.instance,
            asset_graph_subset=AssetGraphSubset(partitions_subsets_by_asset_key=subsets),
            title=f"{len(cells)} carried-over cells of {study}",
            description=f"Asked for by run {context.run_id} of the job {NAME}.",
            run_config=None,
        )
    )
    return backfill_id
