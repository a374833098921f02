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
    released = []
    for asset in graph.assets.values():
        for ref in asset.refs():
            last = asset.released_after(ref.key)
            if last is None or reader not in (last, None) or not _is_read(graph, store, ref, last):
                continue
            with store.turn(ref):
                if _is_read(graph, store, ref, last):  # and has not been made again just now
                    store.release(ref)
                    released.append(ref)
    return released


def _is_read(graph: Graph, store: Store, ref: Ref, last: Ref) -> bool:
    freshness = Freshness(graph, store)
    return {freshness.state(last), freshness.state(ref)} == {"fresh"}
