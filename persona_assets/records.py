"""What Dagster has on record of what has landed.

A run that dies between landing and reporting leaves no record, and a history that was moved away
takes all of them along: the web interface and its automation then wait for what has long landed.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from persona_assets.freshness import Freshness
from persona_assets.store import Ref

if TYPE_CHECKING:
    from dagster import DagsterInstance


def unrecorded(
    freshness: Freshness, instance: DagsterInstance, refs: Collection[Ref]
) -> frozenset[Ref]:
    """Those of ``refs`` that are up to date, and whose content Dagster's latest record is not of.

    To materialize one is to have it kept and recorded. One query an asset.
    """
    found = set()
    for asset in {ref.asset for ref in refs}:
        landed = [ref for ref in refs if ref.asset == asset and freshness.state(ref) == "fresh"]
        versions = _recorded(freshness.graph.study.name, instance, landed)
        found |= {
            ref for ref in landed if versions.get(ref) != freshness.manifest(ref).data_version
        }
    return frozenset(found)


def _recorded(study: str, instance: DagsterInstance, refs: list[Ref]) -> dict[Ref, str | None]:
    """Data version of the latest materialization of each of one asset's partitions."""
    import dagster as dg
    from dagster._core.definitions.data_version import DATA_VERSION_TAG

    if not refs:
        return {}
    key = dg.AssetKey([study, refs[0].asset])
    if refs[0].key is None:
        event = instance.get_latest_materialization_event(key)
        tags = (event and event.asset_materialization.tags) or {}
        return {refs[0]: tags.get(DATA_VERSION_TAG)}
    tags = instance.event_log_storage.get_latest_tags_by_partition(
        key,
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        [DATA_VERSION_TAG],
        [ref.key for ref in refs],
    )
    return {ref: tags.get(ref.key, {}).get(DATA_VERSION_TAG) for ref in refs}
