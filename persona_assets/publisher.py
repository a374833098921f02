"""``persona-assets publish``: the publish assets of what has landed, each its own Dagster run.

What is pending (see :mod:`persona_assets.publishing.markers`) is made again where there is a key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from persona_assets import environment
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.publish_table import PLACES, PUBLISH_JOBS
from persona_assets.publishing import wandb_client
from persona_assets.publishing.markers import KEYS, MARKED, Markers
from persona_assets.run_plan import Plan, Unit
from persona_assets.run_worker import Outcome
from persona_assets.runner import execute
from persona_assets.store import Ref, Store
from persona_assets.study import Study, load_study

#: What a study file may say of each place.
_SECTIONS = {
    "wandb": "wandb: {project: my-project}",
    "hub": "hub: {dataset: owner/my-rows, model: owner/my-adapters}",
}

#: Runs at a time: they log and upload, which more processors make little faster.
WORKERS = 2


@dataclass(frozen=True)
class Published:
    """What became of a ``publish``.

    Attributes:
        outcomes: Of each Dagster run.
        pending: The partitions that are logged here and not yet at their place, and why.
        late: Those of them whose place there is a key for.
        commits: The partitions that are on the hub, and where there.
    """

    outcomes: dict[Unit, Outcome]
    pending: dict[Ref, str]
    late: tuple[Ref, ...]
    commits: dict[Ref, str]


def places(study: Study, to: str | None = None) -> list[str]:
    """The places that a study is published to, or only ``to``.

    Raises:
        ValueError: the study file names none, or not this one.
    """
    named = [place for place in PLACES if getattr(study.publish, place)]
    if to is not None and to not in named:
        named = []
    if not named:
        what = f"publish.{to}" if to else "publish section"
        raise ValueError(
            f"study {study.name} has no {what} in its file: nothing of it is to be published. "
            f"Add one, such as `publish: {{{_SECTIONS[to or 'wandb']}}}`; it stales nothing."
        )
    return named if to is None else [to]


def publish(
    study_name: str, to: str | None = None, say: Callable[[str], None] = print
) -> Published:
    """Publish what has landed and is up to date; nothing is trained or evaluated.

    Raises:
        ValueError: the study file names no place, or not ``to``.
        As ``runner.execute``.
    """
    study = load_study(environment.study_file(study_name))
    asked = places(study, to)
    outcomes = execute(study, lambda graph, store: plan(graph, store, asked), WORKERS, say)
    graph = Graph(study)
    freshness = Freshness(graph, open_store(study.name)).read_ahead()
    waiting = {
        ref: (place, why)
        for place in MARKED.intersection(asked)
        for ref in _refs(graph, place)
        if freshness.state(ref) == "fresh" and (why := _pending(freshness, ref))
    }
    uploads = [ref for place in asked if place == "hub" for ref in _refs(graph, place)]
    landed = {
        ref: freshness.manifest(ref).summary for ref in uploads if freshness.state(ref) == "fresh"
    }
    return Published(
        outcomes,
        {ref: why for ref, (_, why) in waiting.items()},
        tuple(ref for ref, (place, _) in waiting.items() if os.environ.get(KEYS[place])),
        {ref: "{repo_type} {repo} at {commit}".format(**at) for ref, at in landed.items()},
    )


def plan(graph: Graph, store: Store, asked: Sequence[str]) -> Plan:
    """The units that publish to the places ``asked`` what has landed, and what is left out."""
    freshness = Freshness(graph, store).read_ahead()
    todo = Plan([], {})
    makers: dict[Ref, Unit] = {}
    for place in asked:
        key = os.environ.get(KEYS[place])
        for job in PLACES[place]:
            for ref in (r for name in PUBLISH_JOBS[job].assets for r in graph.assets[name].refs()):
                upstream = graph.upstream(ref)
                lacks = [u for u in upstream if u not in makers and freshness.state(u) != "fresh"]
                if lacks:
                    more = f", and {len(lacks) - 1} more" if len(lacks) > 1 else ""
                    todo.left_out.append(f"{ref} ({freshness.why(lacks[0])}{more})")
                    continue
                fresh = freshness.state(ref) == "fresh"
                # What is on the hub is compared with what landed each time, which costs little.
                again = bool(key and fresh and (place not in MARKED or _pending(freshness, ref)))
                unit = makers[ref] = Unit(job, ref.key, (ref,), again)
                todo.units.append(unit)
                todo.waits_for[unit] = {makers[u] for u in upstream if u in makers}
    return todo


def _refs(graph: Graph, place: str) -> list[Ref]:
    names = (name for job in PLACES[place] for name in PUBLISH_JOBS[job].assets)
    return [ref for name in names for ref in graph.assets[name].refs()]


def _pending(freshness: Freshness, ref: Ref) -> str:
    """Why a landed partition is not yet at its place; nothing if it is."""
    study = freshness.graph.study
    markers = Markers(environment.publish_dir(), study.name)
    target = wandb_client.target(study.publish.wandb)
    if markers.published(ref, freshness.manifest(ref).data_version, target):
        return ""
    marker = markers.read(ref)
    return (marker and marker.why) or f"there is no marker of its publication at {target}"
