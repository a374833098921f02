"""What Dagster knows of what has landed.

A partition lands in the store before its run says so. A process that is killed in between leaves it
landed, and to Dagster's pages not materialized, or as it was before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

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
