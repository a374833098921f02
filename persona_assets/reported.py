"""What Dagster knows, against what is the case: a killed process tells it nothing more.

Its run counts as started for ever. And a partition lands in the store before its run says so: if
that is killed in between, Dagster's pages have the partition as missing, or as it was before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

from persona_assets.environment import WORKER_TAG
from persona_assets.store import Manifest, Ref

if TYPE_CHECKING:
    from dagster import AssetKey, DagsterInstance


def unreported(instance: DagsterInstance, study: str, landed: Iterable[Manifest]) -> set[Ref]:
    """Those of the landed partitions whose content is not what Dagster has seen last."""
    import dagster as dg

    by_asset: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in landed:
        by_asset[manifest.ref.asset].append(manifest)
    return {
        manifest.ref
        for asset, manifests in by_asset.items()
        for seen in [_seen(instance, dg.AssetKey([study, asset]))]
        for manifest in manifests
        if seen.get(manifest.ref.key) != manifest.data_version
    }


def _seen(instance: DagsterInstance, asset: AssetKey) -> dict[str | None, str | None]:
    """Partition (None where there are none) → the data version of its latest materialization."""
    import dagster as dg
    from dagster._core.definitions.data_version import DATA_VERSION_TAG

    by_partition = instance.event_log_storage.get_latest_tags_by_partition(
        asset, dg.DagsterEventType.ASSET_MATERIALIZATION, [DATA_VERSION_TAG]
    )
    seen: dict[str | None, str | None] = {
        partition: tags.get(DATA_VERSION_TAG) for partition, tags in by_partition.items()
    }
    latest = instance.get_latest_materialization_event(asset)
    if latest is not None and latest.asset_materialization.partition is None:
        seen[None] = (latest.asset_materialization.tags or {}).get(DATA_VERSION_TAG)
    return seen


def fail_lost_runs(study_name: str, pid: int | None = None) -> None:
    """Mark runs that no worker is at any more as failed: they would fill the UI's run queue.

    The run lock is ours, so every unfinished run of a worker is lost but those of our own
    workers; ``pid`` names the one of those that has died. Also lets Dagster make its tables
    before several workers try to at once.
    """
    import dagster as dg

    from persona_assets.launcher import was_launched

    statuses = dg.DagsterRunStatus
    unfinished = dg.RunsFilter(
        tags={"study": study_name} | ({WORKER_TAG: str(pid)} if pid else {}),
        statuses=[statuses.NOT_STARTED, statuses.STARTING, statuses.STARTED],
    )
    with dg.DagsterInstance.get() as instance:
        for lost in instance.get_runs(unfinished):
            if WORKER_TAG in lost.tags and not was_launched(lost):
                instance.report_run_failed(lost, "The worker process died.")
