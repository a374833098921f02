"""What a run of a study makes: its Dagster runs, and which waits for which."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, field

from persona_assets.asset_table import JOBS
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.store import Ref, Store

#: What is made of all trained cells before the first is evaluated, where the engine fills a GPU as
#: training does: so a worker starts each of the two once, and not once a cell.
_TRAINED_FIRST = ("training_dataset", "checkpoint")


@dataclass(frozen=True, slots=True)
class Unit:
    """One Dagster run: a job, for one partition; ``refs`` is what it makes.

    ``again``: also what is up to date.
    """

    job: str
    key: str | None
    refs: tuple[Ref, ...]
    again: bool = False

    def __str__(self) -> str:
        if self.job == "cell":
            trains = self.refs[-1].asset == "checkpoint"
            return f"{self.refs[-1]}" if trains else str(self.key)
        one = self.key is not None or len(self.refs) == 1
        return str(self.refs[0]) if one else self.job


@dataclass
class Plan:
    """The units of a run, and for each the units that it waits for."""

    units: list[Unit]
    waits_for: dict[Unit, set[Unit]]
    #: Units that train, in a study that evaluates nothing before they are done.
    training: frozenset[Unit] = frozenset()
    left_out: list[str] = field(default_factory=list)


def plan(graph: Graph, store: Store, cells: str = "*", up_to: str | None = None) -> Plan:
    """The units that make the cells matching the glob ``cells``, and what can follow from them.

    With ``up_to``, only what that asset is made from, and itself. A contrast is left out while any
    of its cells has neither landed nor is chosen, and so are the aggregates: an estimate over
    fewer cells than its definition is never made.

    Raises:
        ValueError: no cell matches, or there is no asset ``up_to``.
    """
    study = graph.study
    asked = asked_for(graph, up_to)
    chosen = [cell for cell in study.cells if fnmatch.fnmatchcase(cell.key, cells)]
    if not chosen:
        raise ValueError(
            f"no cell of study {study.name} matches {cells!r}; keys are source.arm.seed, "
            f"such as {study.cells[0].key}"
        )
    keys = {cell.key for cell in chosen}
    freshness = Freshness(graph, store).read_ahead()
    available = keys | {
        cell.key
        for cell in study.cells
        if {freshness.state(Ref(a, cell.key)) for a in ("cell_outcomes", "cell_diagnostics")}
        == {"fresh"}
    }
    conditions = {cell.condition for cell in chosen}
    contrasts = [
        contrast.key
        for contrast in study.contrast_list
        if {cell.key for cell in study.contrast_cells(contrast)} <= available
    ]
    wanted: dict[str, Iterable[str | None]] = {
        "rationales": [c for c in study.conditions if c in conditions],
        "prior_checkpoints": [cell.key for cell in chosen if cell.origin == "carry_over"],
        "forced_rationales": study.forced_arms,
        "baseline": [None],
        "cell": [cell.key for cell in chosen],
        "contrasts": contrasts,
        "aggregates": [None] if len(available) == len(study.cells) else [],
    }
    units = [Unit("inputs", None, (Ref(name),)) for name in JOBS["inputs"].assets if name in asked]
    alone = study.evaluation.engine == "vllm"
    training = [name for name in _TRAINED_FIRST if name in asked] if alone else []
    first: list[Unit] = []
    for job, job_keys in wanted.items():
        names = [name for name in JOBS[job].assets if name in asked]
        if job == "baseline" and training:
            first = [
                Unit("cell", cell.key, tuple(Ref(name, cell.key) for name in training))
                for cell in chosen
                if cell.origin == "trained"
            ]
            units += first
        made = {ref for unit in units for ref in unit.refs}
        for key in job_keys:
            if refs := tuple(ref for ref in (Ref(n, key) for n in names) if ref not in made):
                units.append(Unit(job, key, refs))
    maker = {ref: unit for unit in units for ref in unit.refs}
    waits_for = {
        unit: {
            maker[upstream]
            for ref in unit.refs
            for upstream in graph.upstream(ref)
            if upstream in maker and maker[upstream] is not unit
        }
        for unit in units
    }
    left_out = [
        c.key
        for c in study.contrast_list
        if c.key not in contrasts and "contrast_estimate" in asked
    ]
    if len(available) < len(study.cells) and asked & set(JOBS["aggregates"].assets):
        left_out.append(
            f"{up_to or 'the report'} ({len(study.cells) - len(available)} cells are missing)"
        )
    return Plan(units, waits_for, frozenset(first), left_out)


def asked_for(graph: Graph, up_to: str | None) -> frozenset[str]:
    """The assets to be made: all, or what ``up_to`` is made from and itself."""
    if up_to in graph.assets and graph.assets[up_to].group == "publish":
        raise ValueError(f"{up_to} is made by `persona-assets publish`")
    try:
        return frozenset(graph.assets) if up_to is None else graph.ancestors(up_to)
    except KeyError as error:
        raise ValueError(error.args[0]) from error
