"""Removing files that have been read for the last time, where the study says so."""

from __future__ import annotations

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Ref, Store


def release_read(graph: Graph, store: Store, reader: Ref | None = None) -> list[Ref]:
    """Release what has been read for the last time; the partitions that were.

    A partition is released once the last one to read it is up to date: not while that is missing,
    stale or failed its checks. What an earlier, killed call has left of it goes as well.

    Args:
        reader: Only what this partition is the last to read; everything by default.

    Raises:
        StoreError: files cannot be removed.
    """
    freshness = Freshness(graph, store)
    released = []
    for asset in graph.assets.values():
        for ref in asset.refs():
            last = asset.released_after(ref.key)
            if last is None or reader not in (last, None):
                continue
            if {freshness.state(last), freshness.state(ref)} == {"fresh"}:
                store.release(ref)
                released.append(ref)
    return released
