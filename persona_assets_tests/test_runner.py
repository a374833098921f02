"""The plan of a run: which Dagster runs, and what each waits for."""

from __future__ import annotations

from collections import Counter

import pytest

from persona_assets import environment
from persona_assets.graph import Graph
from persona_assets.run_plan import Plan, Unit, plan
from persona_assets.run_worker import Outcome
from persona_assets.runner import _Dispatcher, _Progress, _Worker, default_workers
from persona_assets.store import Ref, Store


@pytest.fixture
def graph(mini) -> Graph:
    return Graph(mini)


def jobs(todo) -> Counter:
    return Counter(unit.job for unit in todo.units)


def test_the_whole_study(graph, tmp_path):
    todo = plan(graph, Store(tmp_path, "mini"))
    assert jobs(todo) == {
        "inputs": 3,
        "rationales": 22,
        "prior_checkpoints": 27,
        "baseline": 1,
        "cell": 66,
        "contrasts": 8,
        "aggregates": 1,
    }
    assert todo.left_out == []


def test_a_cell_waits_for_exactly_what_it_is_made_from(graph, tmp_path):
    todo = plan(graph, Store(tmp_path, "mini"))
    waits = {str(unit): {str(u) for u in todo.waits_for[unit]} for unit in todo.units}
    inputs = {"tokenizer", "question_bank", "base_model"}
    common = inputs | {"baseline_outcomes"}  # which the cell's diagnostics are held against
    assert waits["librarian.garbage_cot.42"] == common | {"rationales[librarian.garbage_cot]"}
    assert waits["librarian.persona_cot.42"] == common | {
        "rationales[librarian.persona_cot]",
        "prior_checkpoint[librarian.persona_cot.42]",
    }
    assert len(waits["contrast_estimate[persona_cot-garbage_cot.source_loss]"]) == 26


def test_units_in_plan_order_never_wait_for_a_later_one(graph, tmp_path):
    todo = plan(graph, Store(tmp_path, "mini"))
    place = {unit: index for index, unit in enumerate(todo.units)}
    assert all(place[w] < place[unit] for unit in todo.units for w in todo.waits_for[unit])


def test_a_glob_leaves_out_what_cannot_be_complete(graph, tmp_path):
    todo = plan(graph, Store(tmp_path, "mini"), "librarian.*.42")
    assert jobs(todo)["cell"] == 7
    assert jobs(todo)["contrasts"] == 0
    assert jobs(todo)["aggregates"] == 0
    assert len(todo.left_out) == 9
    assert "59 cells are missing" in todo.left_out[-1]


def test_landed_cells_complete_a_glob(graph, own_mini_store):
    store = own_mini_store
    todo = plan(graph, store, "librarian.*.42")
    assert jobs(todo)["cell"] == 7
    assert jobs(todo)["contrasts"] == 8
    assert jobs(todo)["aggregates"] == 1
    (store.folder(Ref("cell_outcomes", "comedian.garbage_cot.42")) / "manifest.json").unlink()
    assert jobs(plan(graph, store, "librarian.*.42"))["contrasts"] == 4


def test_a_glob_without_a_cell_is_refused(graph, tmp_path):
    with pytest.raises(ValueError, match=r"no cell of study mini matches 'plumber\.\*'"):
        plan(graph, Store(tmp_path, "mini"), "plumber.*")


def test_a_run_ends_when_the_last_failure_leaves_only_skips(mini, tmp_path):
    """Nothing is at work then, and nothing will ever be ready."""
    first, second = (Unit("x", None, (Ref(name),)) for name in ("a", "b"))
    todo = Plan([first, second], {first: set(), second: {first}})
    lines: list[str] = []
    outcomes = {first: Outcome("failed")}
    _Dispatcher("mini", todo, outcomes, lines.append).drain([second], 1)
    assert outcomes[second].status == "skipped"


def test_up_to_an_asset_is_what_it_is_made_from(graph, tmp_path):
    store = Store(tmp_path, "mini")
    data = plan(graph, store, "librarian.*.42", up_to="training_dataset")
    assert jobs(data) == {"inputs": 2, "rationales": 7, "cell": 7}
    assert {ref.asset for unit in data.units for ref in unit.refs} == {
        "tokenizer",
        "question_bank",
        "rationales",
        "training_dataset",
    }
    assert data.left_out == []
    checkpoints = plan(graph, store, "librarian.*.42", up_to="checkpoint")
    assert jobs(checkpoints)["prior_checkpoints"] == 3
    assert "prior_accuracies" not in {r.asset for unit in checkpoints.units for r in unit.refs}
    assert jobs(plan(graph, store, up_to="multiplicity"))["contrasts"] == 8
    part = plan(graph, store, "librarian.*.42", up_to="loss_matrix")
    assert part.left_out == ["loss_matrix (59 cells are missing)"]
    with pytest.raises(ValueError, match=r"no asset 'dataset'\. Did you mean"):
        plan(graph, store, up_to="dataset")


def test_a_contrast_waits_for_the_diagnostics_of_its_cells(graph, own_mini_store):
    """Evaluated cells that were not diagnosed cannot be contrasted by a run of other cells."""
    store = own_mini_store
    undiagnosed = "librarian.persona_cot.42"
    (store.folder(Ref("cell_diagnostics", undiagnosed)) / "manifest.json").unlink()
    todo = plan(graph, store, "librarian.garbage_cot.42")
    contrasts = {unit.key for unit in todo.units if unit.job == "contrasts"}
    assert contrasts == {
        c.key for c in graph.study.contrast_list if "persona_cot" not in (c.a, c.b)
    }
    assert todo.left_out[-1] == "the report (1 cells are missing)"


def test_a_gpu_is_given_to_one_worker(mini, length_matched, monkeypatch):
    monkeypatch.setattr(environment, "processors", lambda: 16)
    assert default_workers(mini) == 8
    assert default_workers(length_matched) == 1
    assert default_workers(length_matched, "training_dataset") == 8
    with pytest.raises(ValueError, match="training_dataset"):
        default_workers(length_matched, "training_datset")


def test_with_an_engine_that_fills_a_gpu_all_training_comes_first(length_matched, tmp_path):
    """So that a worker starts trainer and engine once each, and fetches no checkpoint early."""
    todo = plan(Graph(length_matched), Store(tmp_path, "length_matched"))
    cells = [unit for unit in todo.units if unit.job == "cell"]
    training, rest = cells[:39], cells[39:]
    assert {tuple(ref.asset for ref in u.refs) for u in training} == {
        ("training_dataset", "checkpoint")
    }
    assert str(training[0]).startswith("checkpoint[")
    evaluated = {u.key: tuple(ref.asset for ref in u.refs) for u in rest}
    assert len(evaluated) == 66
    assert evaluated[training[0].key] == ("cell_outcomes", "cell_diagnostics")
    assert evaluated["librarian.persona_cot.42"] == (
        *("training_dataset", "checkpoint", "cell_outcomes", "cell_diagnostics"),
    )
    place = {unit: index for index, unit in enumerate(todo.units)}
    (baseline,) = (unit for unit in todo.units if unit.job == "baseline")
    assert place[training[-1]] < place[baseline] < place[rest[0]]
    assert all(place[w] < place[unit] for unit in todo.units for w in todo.waits_for[unit])
    shown = _Progress(todo, {})
    assert len(shown.cells) == 66
    assert shown.line(training[0], Outcome("done", 15.0)).startswith("[  0/66 cells] checkpoint[")
    assert "1.0 min left" not in shown.line(training[0], Outcome("done", 15.0))
    shown.outcomes[rest[0]] = Outcome("done", 120.0)
    assert shown.line(rest[0], Outcome("done", 120.0)).startswith("[  1/66 cells] ")


def test_with_an_engine_in_another_place_a_cell_is_one_run(length_matched, tmp_path):
    settings = length_matched.evaluation.model_copy(update={"engine": "vllm_server"})
    served = length_matched.model_copy(update={"evaluation": settings})
    assert jobs(plan(Graph(served), Store(tmp_path, "length_matched")))["cell"] == 66


def test_no_evaluation_starts_while_training_is_left_however_late_its_rationales_land(
    length_matched, tmp_path
):
    todo = plan(Graph(length_matched), Store(tmp_path, "length_matched"), "librarian.*.42")
    late = next(unit for unit in todo.units if unit.job == "rationales")
    done = {unit: Outcome("done") for unit in todo.units if unit.job in ("inputs", "rationales")}
    del done[late]
    (waiting,) = (unit for unit in todo.training if late in todo.waits_for[unit])
    pending = [unit for unit in todo.units if unit not in done]
    dispatcher = _Dispatcher("length_matched", todo, done, print)
    assert set(dispatcher._ready(pending)) == {late} | todo.training - {waiting}
    done |= {unit: Outcome("done") for unit in [late, *todo.training]}
    pending = [unit for unit in todo.units if unit not in done]
    assert {unit.job for unit in dispatcher._ready(pending)} == {"baseline"}


def test_a_worker_may_have_children_for_vllm_is_one():
    worker = _Worker("mini")
    assert not worker.process.daemon
    worker.stop()
    assert worker.process.exitcode == 0
