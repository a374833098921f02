"""What `persona-assets publish` makes, and what it leaves out."""

from __future__ import annotations

import shutil

import pytest

from persona_assets import environment, publisher
from persona_assets.graph import Graph
from persona_assets.publishing import wandb_client
from persona_assets.publishing.markers import KEYS, Markers
from persona_assets.run_plan import plan as run_plan
from persona_assets.store import Ref
from persona_assets.study import parse_study
from persona_assets_tests.landed import MINI

CELL = "librarian.garbage_cot.42"


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    for variable in KEYS.values():
        monkeypatch.delenv(variable, raising=False)


def by_ref(todo):
    return {unit.refs[0]: unit for unit in todo.units}


def test_bundles_wait_for_exactly_the_runs_that_they_consume(mini_store, mini):
    todo = publisher.plan(MINI, mini_store, ["wandb"])
    units = by_ref(todo)
    assert todo.left_out == []
    assert units.keys() == {
        *(Ref("wandb_run", cell.key) for cell in mini.cells),
        *(Ref("wandb_bundle", key) for key in ("trained", "carry_over")),
    }
    assert not any(unit.again for unit in todo.units)  # there is no key
    waits = {
        key: {unit.key for unit in todo.waits_for[units[Ref("wandb_bundle", key)]]}
        for key in ("trained", "carry_over")
    }
    assert waits == {
        "trained": {cell.key for cell in mini.cells},
        "carry_over": {cell.key for cell in mini.cells_of("carry_over")},
    }


def test_with_a_key_what_is_pending_is_made_again(mini_store, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key")
    markers = Markers(environment.publish_dir(), "mini")
    done, other = Ref("wandb_run", CELL), Ref("wandb_bundle", "trained")
    there = wandb_client.target(MINI.study.publish.wandb)
    for ref in (done, other):
        markers.publish(ref, mini_store.landed(ref).data_version, there, lambda: "url")
    markers.publish(other, "other content", there, lambda: "url")
    units = by_ref(publisher.plan(MINI, mini_store, ["wandb"]))
    assert {ref for ref, unit in units.items() if not unit.again} == {done}
    monkeypatch.setenv("WANDB_BASE_URL", "https://another.example")
    assert all(unit.again for unit in by_ref(publisher.plan(MINI, mini_store, ["wandb"])).values())


def test_a_password_in_the_servers_address_is_told_nowhere(monkeypatch, mini):
    monkeypatch.setenv("WANDB_BASE_URL", "https://someone:secret@w.example/api/")
    project = mini.publish.wandb.project
    assert wandb_client.target(mini.publish.wandb) == f"https://w.example/api/{project}"


def test_what_has_not_landed_is_left_out_by_name(own_mini_store):
    shutil.rmtree(own_mini_store.folder(Ref("cell_outcomes", CELL)))
    todo = publisher.plan(MINI, own_mini_store, ["wandb"])
    left_out = {text.partition(" ")[0]: text for text in todo.left_out}
    assert left_out.keys() == {f"wandb_run[{CELL}]", "wandb_bundle[trained]"}
    assert f"cell_outcomes[{CELL}] has not landed" in left_out[f"wandb_run[{CELL}]"]
    assert len(todo.units) == 66


def test_a_run_makes_and_reaches_none_of_it(mini_store):
    todo = run_plan(MINI, mini_store)
    assert not {ref for u in todo.units for ref in u.refs if ref.asset.startswith("wandb")}
    with pytest.raises(ValueError, match="wandb_run is made by `persona-assets publish`"):
        run_plan(MINI, mini_store, up_to="wandb_run")


def test_a_study_that_names_no_place_says_so(study_texts, mini):
    unpublished = parse_study(study_texts["mini"].partition("publish:")[0])
    assert not {a.group for a in Graph(unpublished).assets.values()} & {"publish"}
    with pytest.raises(ValueError, match="has no publish section in its file"):
        publisher.places(unpublished)
    assert publisher.places(mini) == ["wandb"]
    with pytest.raises(ValueError, match=r"has no publish\.hub in its file"):
        publisher.places(mini, "hub")


def test_nothing_published_is_an_input_of_anything():
    for ref in MINI.refs:
        if not ref.asset.startswith("wandb"):
            assert not [up for up in MINI.upstream(ref) if up.asset.startswith("wandb")]
