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
    lasts = {
        ref: last
        for asset in graph.assets.values()
        for ref in asset.refs()
        if (last := asset.released_after(ref.key)) is not None and reader in (last, None)
    }
    released, before = [], Freshness(graph, store)
    if lasts and reader is None:
        before.read_ahead()
    for ref, last in lasts.items():
        if not _is_read(before, ref, last):
            continue
        with store.turn(ref):
            if _is_read(Freshness(graph, store), ref, last):  # and was not made again just now
                store.release(ref)
                released.append(ref)
    return released


def _is_read(freshness: Freshness, ref: Ref, last: Ref) -> bool:
    return {freshness.state(last), freshness.state(ref)} == {"fresh"}
