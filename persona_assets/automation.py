"""What happens by itself: aggregates as soon as their cells have landed, and a page of what is
there so far.

The sensors are level-triggered: each tick compares what there is with what there should be, so that
it does not matter whether something landed before the daemon started, while a run was at work, or
by ``persona-assets run``. Freshness is our own: Dagster's does not see a changed study file, and
its conditions count a check that could not be verified as failed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterRunStatus as Status

from persona_assets import environment
from persona_assets.asset_table import JOBS
from persona_assets.environment import WORKER_TAG, is_of_this_machine
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.hashing import sha256_json
from persona_assets.launcher import was_launched
from persona_assets.object_store import open_store
from persona_assets.reporting.so_far import SO_FAR, so_far
from persona_assets.run_lock import is_running
from persona_assets.run_plan import Unit
from persona_assets.store import Ref, Store
from persona_assets.study import Study, load_study

if TYPE_CHECKING:
    from dagster._core.definitions.unresolved_asset_job_definition import (
        UnresolvedAssetJobDefinition,
    )

#: Run tag: what an automatic run is to make.
MAKES = "persona_assets/makes"
#: Run tag: the hash of what that was to be made from when the run was asked for.
MADE_FROM = "persona_assets/made_from"

_UNFINISHED = [s for s in Status if s not in (Status.SUCCESS, Status.FAILURE, Status.CANCELED)]

#: A run to ask for, or in words why none is.
Decision = dg.RunRequest | str


def study_sensors(
    study: Study, jobs: Mapping[str, UnresolvedAssetJobDefinition]
) -> list[dg.SensorDefinition]:
    """The sensors of a study's code location; ``jobs`` are its jobs by name."""
    loaded = Graph(study)

    @dg.sensor(
        jobs=[jobs["contrasts"], jobs["aggregates"]],
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=10,
        description="Estimates each contrast as soon as its cells have landed, then everything "
        "that needs the whole grid, up to the report. What failed is not tried again before "
        "something that it is made from has changed. Rests while `persona-assets run` is at work.",
    )
    def make_aggregates(context: dg.SensorEvaluationContext):
        graph, store = _now(loaded)
        if is_running(store):
            return dg.SkipReason(
                f"a `persona-assets run` of study {study.name} is at work, and makes them itself"
            )
        look = Look(context.instance, Freshness(graph, store))
        contrasts = graph.assets["contrast_estimate"].refs()
        whole = tuple(Ref(name) for name in JOBS["aggregates"].assets if name in graph.assets)
        return _result(
            [
                *(look.decide(Unit("contrasts", ref.key, (ref,))) for ref in contrasts),
                look.decide(Unit("aggregates", None, whole)),
            ]
        )

    @dg.sensor(
        job=jobs[SO_FAR.asset],
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=30,
        description="Keeps a page of what has landed so far and what is missing, marked as "
        "incomplete: makes it again whenever what is there differs from what it says.",
    )
    def keep_so_far(context: dg.SensorEvaluationContext):
        graph, store = _now(loaded)
        look = Look(context.instance, Freshness(graph, store))
        page, shown = so_far(look.freshness), look.freshness.manifest(SO_FAR)
        if shown is None and page.is_empty:
            return dg.SkipReason(f"nothing of study {study.name} has been evaluated yet")
        if shown is not None and shown.provenance.inputs == page.inputs:
            return dg.SkipReason("the page says what is there")
        unit, version = Unit(SO_FAR.asset, None, (SO_FAR,)), sha256_json(page.inputs)
        return _result([look.ask(unit, [SO_FAR], lambda runs: version)])

    return [make_aggregates, keep_so_far]


class GridChanged(RuntimeError):
    """The study file has other partitions than when the code location was loaded."""


def _now(loaded: Graph) -> tuple[Graph, Store]:
    """The graph of the study file as it is now, as runs will read it, and the store.

    Raises:
        StudyError: the study file cannot be used.
        GridChanged: its partitions are not those that Dagster knows.
    """
    name = loaded.study.name
    graph = Graph(load_study(environment.study_file(name)))
    now, then = ({a.name: a.keys for a in g.assets.values()} for g in (graph, loaded))
    if changed := [asset for asset in now | then if now.get(asset, ()) != then.get(asset, ())]:
        raise GridChanged(
            f"study {name} has other partitions of {', '.join(changed)} than when this code "
            "location was loaded. Reload it (Deployment, Code locations)."
        )
    return graph, open_store(name)


def _result(decisions: Sequence[Decision]) -> list[dg.RunRequest] | dg.SkipReason:
    requests = [decision for decision in decisions if isinstance(decision, dg.RunRequest)]
    return requests or dg.SkipReason("\n".join(map(str, decisions)))


@dataclass
class Look:
    """What there is at one tick: the runs of the instance, and then the store.

    In that order: what a run lands and ends with in between is seen.
    """

    instance: dg.DagsterInstance
    freshness: Freshness

    def __post_init__(self) -> None:
        self.study = self.freshness.graph.study
        self.being_made = dict(self._being_made())
        self.freshness.read_ahead()

    def _being_made(self) -> Iterator[tuple[Ref, str]]:
        """The partitions that unfinished runs are to make, with the run's id.

        An unfinished run of ``persona-assets run`` while none is at work is lost: it makes nothing.
        Of one on another machine that cannot be said from here.
        """
        for run in self.instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
            worker = run.tags.get(WORKER_TAG)
            if worker and is_of_this_machine(worker) and not was_launched(run):
                continue
            selected = [list(key.path) for key in run.asset_selection or ()]
            if not selected and run.tags.get("study") == self.study.name:
                job = JOBS.get(run.job_name)
                selected = [
                    [self.study.name, name] for name in (job.assets if job else [run.job_name])
                ]
            for study, *name in selected:
                if study == self.study.name:
                    yield Ref("/".join(name), run.tags.get("dagster/partition")), run.run_id

    def decide(self, unit: Unit) -> Decision:
        """Whether to make a unit now: all of it that is not up to date, in one run."""
        state, why = self.freshness.state, self.freshness.why
        wanting = [ref for ref in unit.refs if state(ref) in ("missing", "stale")]
        if not wanting:
            failed = [why(ref) for ref in unit.refs if state(ref) == "failed"]
            return "; ".join(failed) or f"{unit} is up to date"
        if waits := self.freshness.waits_for(wanting):
            first, *more = waits.values()
            return f"{unit} waits: {first}" + (f", and {len(more)} more" if more else "")

        def made_from(runs: Collection[str]) -> str:
            """Hash of what ``wanting``, and what ``runs`` made of the unit already, is made from.

            What a failed run did land does not count as a change.
            """
            refs = [ref for ref in unit.refs if ref in wanting or self._maker(ref) in runs]
            return sha256_json({str(r): self.freshness.inputs(r, beside=refs) for r in refs})

        return self.ask(unit, wanting, made_from)

    def ask(
        self, unit: Unit, wanting: Sequence[Ref], made_from: Callable[[Collection[str]], str]
    ) -> Decision:
        """A run that makes ``wanting``; not while one is at it, nor again after one that failed.

        Args:
            made_from: Hash of what it would be made from now, as if the runs of these ids had made
                nothing yet.
        """
        if busy := sorted({self.being_made[ref] for ref in wanting if ref in self.being_made}):
            return f"{unit} is being made by run {', '.join(busy)}"
        tags = {"study": self.study.name, MAKES: str(unit)}
        runs = self.instance.get_runs(dg.RunsFilter(tags=tags), limit=2)
        same = [run for run in runs if run.tags.get(MADE_FROM) == made_from(_family(run))]
        latest = runs[0] if runs else None
        if latest and latest.is_complete_and_waiting_to_retry:
            return f"{unit} is about to be tried again: the worker of run {latest.run_id} died"
        if latest in same and latest.status != Status.SUCCESS:
            return (
                f"{unit} failed in run {latest.run_id}, and nothing that it is made from has "
                "changed since. Mend the cause and run it by hand."
            )
        if len(same) == 2 and any(self._maker(ref) in _family(r) for ref in wanting for r in same):
            return (
                f"{unit} was made by run {latest.run_id} and is still not up to date: the run has "
                "read other code than this code location. Reload it (Deployment, Code locations)."
            )
        inputs = made_from(())
        return dg.RunRequest(
            run_key=f"{self.study.name}/{unit} from {inputs} after {latest and latest.run_id}",
            job_name=unit.job,
            partition_key=unit.key,
            asset_selection=[dg.AssetKey([self.study.name, ref.asset]) for ref in wanting],
            tags={MAKES: str(unit), MADE_FROM: inputs},
        )

    def _maker(self, ref: Ref) -> str | None:
        manifest = self.freshness.manifest(ref)
        return manifest and manifest.provenance.run_id


def _family(run: dg.DagsterRun) -> set[str]:
    """A run's id and those of the runs that it is a retry of."""
    return {i for i in (run.run_id, run.parent_run_id, run.root_run_id) if i is not None}
