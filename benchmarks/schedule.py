"""What `length_matched` takes on any number of GPUs, from what its parts took when measured.

The units and the order are those of ``run_plan.plan``; workers are taken as ``persona-assets run``
takes them, a GPU each. Nothing is run: each part takes the seconds of :data:`INPUTS`, downloads
share their host's line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import NamedTuple

from persona_assets.run_plan import Plan, Unit


class Input(NamedTuple):
    """A measured value, and where it stands."""

    value: float
    source: str


_EVALUATION, _TRAINING = (
    f"benchmarks/README.md, {table}"
    for table in ("One cell's evaluation on a GPU", "Training on a GPU")
)
#: Seconds, unless the name says otherwise.
INPUTS: dict[str, Input] = {
    "train a cell": Input(15.3, f"{_TRAINING}: ours, in the run of the padded loops"),
    "compile, once a process": Input(82.0, f"{_TRAINING}: warm-up of a process, 70 to 82 s"),
    "evaluate a cell": Input(136.1, f"{_EVALUATION}: merged, whole cell"),
    "start an engine": Input(107.0, f"{_EVALUATION}: merged, start"),
    "adapter in and out": Input(0.28, f"{_EVALUATION}: merged, at most 0.17 and 0.11 s"),
    "whole model in and out": Input(3.7, f"{_EVALUATION}: merged, 2.0 and 1.7 s"),
    "base model, GB": Input(15.0, f"{_EVALUATION}: prepare writes the base"),
    "carried-over checkpoint, GB": Input(15.0, "data/studies/length_matched.yaml: 15 GB each"),
    "SHA-256, GB a second": Input(1.75, "docs/sizing.md: this machine, one thread"),
    "rationales of a condition": Input(41 / 26, "README.md, Figures: 41 s for 26 conditions"),
    "dataset and audits of a cell": Input(73 / 78, "README.md, Figures: 34 + 39 s for 78"),
    "diagnostics of a cell": Input(0.06, "docs/sizing.md: this machine, 51 568 rows"),
    "a Dagster run beside its work": Input(
        1.5, "README.md, Figures: (2 × 135 - 114) s over the 104 runs of the datasets"
    ),
    "estimates to warehouse": Input(62.0, "README.md, Figures: 51 s, and 11 s to make all again"),
    "figures and report": Input(25.0, "README.md, Figures: the mini study's, its ledger included"),
}
#: How often the bytes of a carried-over checkpoint are hashed by the process that evaluates it: as
#: it arrives (hub.py), for its name (training/checkpoints.py), landing, and before it is read
#: (store.py). And of the base by each process that reads it: once.
HASHED = 4

#: Assets that put the untrained model on the GPU, and those that answer from it.
_TRAINED, _EVALUATED = "checkpoint", frozenset({"baseline_outcomes", "cell_outcomes"})


@dataclass(frozen=True)
class Machines:
    """What a study runs on.

    Attributes:
        gpus: Workers, a GPU each.
        gpus_a_host: Which share a line.
        gigabytes: What a host's line carries each way in a second.
        resident: Whether a worker stays from unit to unit, as those of ``persona-assets run``;
            else each unit is a process of its own, as from Dagster's queue or as a Ray job.
    """

    gpus: int
    gpus_a_host: int = 8
    gigabytes: float = 1.25
    resident: bool = True

    @property
    def shared(self) -> bool:
        """Whether hosts share a store: what lands is uploaded, what is read downloaded."""
        return self.gpus > self.gpus_a_host


@dataclass
class _Worker:
    host: int
    unit: Unit | None = None
    #: What is left of its unit: parts, and of each seconds, or gigabytes of the host's line.
    left: list[tuple[str, float]] = field(default_factory=list)
    #: What its process holds by now: the base's files, a compiled trainer, an engine.
    holds: set[str] = field(default_factory=set)
    parts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Schedule:
    """What became of it.

    Attributes:
        wall: Seconds from the first unit to the last.
        until_evaluated: Seconds until no GPU is needed any more.
        parts: Seconds of all workers by part; ``idle`` until the end included.
        last: Those of the worker that is the last to need its GPU, until then.
    """

    machines: Machines
    wall: float
    until_evaluated: float
    parts: dict[str, float]
    last: dict[str, float]

    @property
    def gpu_hours(self) -> float:
        """What is paid for: all GPUs, until the last unit has ended."""
        return self.machines.gpus * self.wall / 3600

    def share(self, *names: str) -> float:
        """Parts' share of what is paid for."""
        return sum(self.parts.get(name, 0.0) for name in names) / (self.machines.gpus * self.wall)


_LINES = ("download", "upload")


def schedule(plan: Plan, carried: frozenset[str], machines: Machines) -> Schedule:
    """Run a plan whose carried-over cells are the keys ``carried``, on paper."""
    pending, done = list(plan.units), set()
    workers: list[_Worker] = []
    now = until = 0.0
    last: dict[str, float] = {}
    while pending or any(worker.unit for worker in workers):
        for unit in [unit for unit in pending if may_start(plan, unit, pending, done)]:
            worker = next((worker for worker in workers if worker.unit is None), None)
            if worker is None and len(workers) < machines.gpus:
                worker = _Worker(len(workers) // machines.gpus_a_host)
                workers.append(worker)
            if worker is None:
                break
            pending.remove(unit)
            worker.unit, worker.left = unit, list(_parts(unit, carried, machines, worker.holds))
        busy = [worker for worker in workers if worker.unit]
        on_line = Counter((worker.host, worker.left[0][0]) for worker in busy)
        rates = {
            place: machines.gigabytes / count if place[1] in _LINES else 1.0
            for place, count in on_line.items()
        }
        step = min(w.left[0][1] / rates[w.host, w.left[0][0]] for w in busy)
        now += step
        for worker in busy:
            part, left = worker.left.pop(0)
            worker.parts[part] += step
            left -= step * rates[worker.host, part]
            if left > 1e-9:
                worker.left.insert(0, (part, left))
            elif not worker.left:
                if _needs_gpu(worker.unit):
                    until, last = now, dict(worker.parts)
                done.add(worker.unit)
                worker.unit = None
    parts = sum((worker.parts for worker in workers), Counter())
    parts["idle"] = max(0.0, machines.gpus * now - parts.total())
    last["idle"] = max(0.0, until - sum(last.values()))
    return Schedule(machines, now, until, dict(parts), last)


def _needs_gpu(unit: Unit) -> bool:
    return any(ref.asset in _EVALUATED or ref.asset == _TRAINED for ref in unit.refs)


def may_start(plan: Plan, unit: Unit, pending: Iterable[Unit], done: Set[Unit]) -> bool:
    """As the runner has it: what it waits for is there, and all training has been started."""
    evaluates = any(ref.asset in _EVALUATED for ref in unit.refs)
    if evaluates and plan.training.intersection(pending):
        return False
    return plan.waits_for[unit] <= done


def _parts(unit: Unit, carried: frozenset[str], machines: Machines, holds: set[str]):
    """The parts of a unit, in order; what its process ``holds`` afterwards is added."""
    value = {name: found.value for name, found in INPUTS.items()}
    base, whole = value["base model, GB"], value["carried-over checkpoint, GB"]
    hashing = 1 / value["SHA-256, GB a second"]
    assets = {ref.asset for ref in unit.refs}
    if not machines.resident:
        holds.clear()
    yield "Dagster", value["a Dagster run beside its work"]
    if "base_model" in assets:
        yield "download", base
        yield "hash", 2 * base * hashing
        if machines.shared:
            yield "upload", base
    if "rationales" in assets:
        yield "data", value["rationales of a condition"]
    if "training_dataset" in assets:
        yield "data", value["dataset and audits of a cell"]
    if _needs_gpu(unit) and "base" not in holds:
        if machines.shared:
            yield "download", base
        yield "hash", base * hashing
        holds.add("base")
    if _TRAINED in assets and unit.key in carried:
        yield "download", whole
        yield "hash", HASHED * whole * hashing
        if machines.shared:
            yield "upload", whole
    elif _TRAINED in assets:
        if "trainer" not in holds:
            yield "start", value["compile, once a process"]
        holds.add("trainer")
        yield "train", value["train a cell"]
    if assets & _EVALUATED:
        if "engine" not in holds:
            yield "start", value["start an engine"]
        holds.discard("trainer")
        holds.add("engine")
        if unit.key is not None:
            way = "whole model" if unit.key in carried else "adapter"
            yield "switch", value[f"{way} in and out"]
        yield "evaluate", value["evaluate a cell"]
    if "cell_diagnostics" in assets:
        yield "analysis", value["diagnostics of a cell"]
    if "report" in assets:
        yield "analysis", value["estimates to warehouse"] + value["figures and report"]
