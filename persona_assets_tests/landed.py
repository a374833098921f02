"""Studies landed as far as the store can tell: a file of a few words for each partition."""

from __future__ import annotations

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Provenance, Ref, Store
from persona_assets.study import load_study, parse_study
from persona_assets_tests.conftest import PROJECT

MINI = Graph(load_study(PROJECT / "data" / "studies" / "mini.yaml"))


def land(graph: Graph, store: Store, ref: Ref, content: str = "content", audits=()) -> None:
    """Land a partition as its asset would, with ``content`` for its data."""
    _land(Freshness(graph, store), ref, content, audits)


def _land(freshness: Freshness, ref: Ref, content: str = "content", audits=()) -> None:
    graph, store = freshness.graph, freshness.store
    with store.draft(ref) as draft:
        (draft / "file").write_text(f"{ref} {content}")
        store.land(
            ref,
            draft,
            audits=audits,
            provenance=Provenance("run", freshness.inputs(ref), graph.study.content_hash),
        )


def land_everything(graph: Graph, store: Store) -> None:
    """Land every partition of a study; half a second for the mini study."""
    freshness = Freshness(graph, store)  # one will do: what lands has not been asked about before
    for asset in graph.assets.values():
        for ref in asset.refs():
            _land(freshness, ref)


def stale(graph: Graph, store: Store) -> dict[str, set[str | None]]:
    """The partitions that are not fresh, by asset."""
    freshness = Freshness(graph, store)
    return {
        name: keys
        for name, asset in graph.assets.items()
        if (keys := {ref.key for ref in asset.refs() if freshness.state(ref) != "fresh"})
    }


def changed(study_text: str, before: str, after: str) -> Graph:
    """The graph of the study file with ``after`` for ``before``."""
    assert before in study_text
    return Graph(parse_study(study_text.replace(before, after)))
