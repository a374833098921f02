"""The schedule of a study on paper: it adds up, and is what a hand computes in small cases."""

from __future__ import annotations

import pytest

from benchmarks.schedule import HASHED, INPUTS, Machines, may_start, schedule
from persona_assets.graph import Graph
from persona_assets.run_plan import plan
from persona_assets.run_worker import Outcome
from persona_assets.runner import _Dispatcher
from persona_assets.store import Store


def value(name: str) -> float:
    return INPUTS[name].value


@pytest.fixture
def scheduled(length_matched, tmp_path):
    """The schedule of the cells that match a glob."""
    carried = frozenset(cell.key for cell in length_matched.cells_of("carry_over"))

    def of(machines: Machines, cells: str = "*"):
        todo = plan(Graph(length_matched), Store(tmp_path, length_matched.name), cells)
        return schedule(todo, carried, machines)

    return of


def test_one_gpu_trains_and_evaluates_everything_one_after_the_other(scheduled):
    found = scheduled(Machines(1))
    whole = value("carried-over checkpoint, GB")
    base = value("base model, GB")
    expected = {
        "train": 39 * value("train a cell"),
        "evaluate": 67 * value("evaluate a cell"),
        "start": value("compile, once a process") + value("start an engine"),
        "download": (base + 27 * whole) / 1.25,
        "hash": (3 * base + 27 * HASHED * whole) / value("SHA-256, GB a second"),
        "idle": 0,
    }
    assert {part: found.parts[part] for part in expected} == pytest.approx(expected, abs=1e-6)
    assert found.wall == pytest.approx(sum(found.parts.values()))
    assert found.gpu_hours == pytest.approx(found.wall / 3600)


def test_all_gpus_are_paid_for_until_the_end_whether_or_not_they_work(scheduled):
    one, many = scheduled(Machines(1)), scheduled(Machines(64))
    assert sum(many.parts.values()) == pytest.approx(64 * many.wall)
    assert many.parts["evaluate"] == pytest.approx(one.parts["evaluate"])
    assert many.parts["idle"] > many.parts["evaluate"]
    assert one.wall / 64 < many.wall < one.wall
    # The untrained model's answers come first: every cell's diagnostics are made beside them.
    first = value("start an engine") + value("evaluate a cell")
    assert many.until_evaluated > 2 * first


def test_downloads_of_a_host_share_its_line(scheduled):
    """Three carried-over cells on three GPUs: no sooner through one line than one by one."""
    cells = "librarian.persona_cot_correct.*"
    slow = {n: scheduled(Machines(n, gigabytes=0.01), cells) for n in (1, 3)}
    whole = value("carried-over checkpoint, GB") / 0.01
    assert slow[1].wall > 3 * whole
    assert 3 * whole < slow[3].wall < slow[1].wall
    assert slow[3].parts["download"] > 2 * slow[1].parts["download"]
    apart = scheduled(Machines(3, gpus_a_host=1, gigabytes=0.01), cells)
    assert apart.parts["upload"] >= 3 * whole  # into the store that the hosts share
    assert "upload" not in slow[3].parts


def test_a_process_a_unit_starts_an_engine_for_each_evaluation(scheduled):
    found = scheduled(Machines(4, resident=False))
    starts = 39 * value("compile, once a process") + 67 * value("start an engine")
    assert found.parts["start"] == pytest.approx(starts)
    stay, once = scheduled(Machines(4)), ("compile, once a process", "start an engine")
    assert stay.parts["start"] == pytest.approx(4 * sum(map(value, once)))
    assert stay.wall < found.wall


def test_what_may_start_is_what_the_runner_would_start(length_matched, tmp_path):
    """From the first unit to the last; rationales that land late hold up all evaluations."""
    todo = plan(Graph(length_matched), Store(tmp_path, "length_matched"), "librarian.*.42")
    late = next(unit for unit in todo.units if unit.job == "rationales")
    pending, done, held_up = list(todo.units), {}, 0
    dispatcher = _Dispatcher("length_matched", todo, done, print)
    while pending:
        ready = dispatcher._ready(pending)
        assert [unit for unit in pending if may_start(todo, unit, pending, done.keys())] == ready
        held_up += ready == [late]
        unit = next((unit for unit in ready if unit != late), late)
        pending.remove(unit)
        done[unit] = Outcome("done")
    assert held_up
