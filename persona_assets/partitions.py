"""Partitions as Dagster knows them: one flat, ordered list of keys an asset, and the edges between.

Dagster's multi-partitions stop at two dimensions, and a pair that never exists holds them up: the
grid is sparse and has three.
"""

from __future__ import annotations

import dagster as dg

from persona_assets.asset_row import Asset
from persona_assets.graph import Graph


def partitions_definition(asset: Asset) -> dg.StaticPartitionsDefinition | None:
    """The asset's partitions: one flat, ordered list of keys, since the grid is sparse."""
    return None if asset.keys is None else dg.StaticPartitionsDefinition(list(asset.keys))


def dependency(graph: Graph, asset: Asset, upstream: str) -> dg.AssetDep:
    """The edge to an upstream asset, mapped partition by partition where both have them.

    Between assets of the same keys it is the identity. A backfill of a cell's assets follows the
    edges down from the first of them: under a mapping of the trained keys only, it silently left
    out the checkpoints of carried-over cells.
    """
    key = dg.AssetKey([graph.study.name, upstream])
    above = graph.assets[upstream].keys
    if asset.keys is None or above is None:
        return dg.AssetDep(key)
    if asset.keys == above:
        return dg.AssetDep(key, partition_mapping=dg.IdentityPartitionMapping())
    mapping = {up: sorted(down) for up, down in graph.key_mapping(asset.name, upstream).items()}
    return dg.AssetDep(key, partition_mapping=dg.StaticPartitionMapping(mapping))
