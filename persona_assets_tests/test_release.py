"""Checkpoints whose files are removed after use, and fetched again where they are needed again."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from persona_assets.audit import audit
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.release import release_read
from persona_assets.store import Ref, Store, StoreError
from persona_assets.study import parse_study
from persona_assets_tests.landed import land, land_everything

KEY = "librarian.persona_cot.42"
CHECKPOINT, OUTCOMES = Ref("checkpoint", KEY), Ref("cell_outcomes", KEY)
OTHER = Ref("checkpoint", "comedian.persona_cot.42")
TRAINED = Ref("checkpoint", "librarian.garbage_cot.42")

#: Small enough to be landed in a test: 2 sources, 1 seed.
_EDITS = (
    ("[software_engineer, librarian, comedian, police_officer]", "[librarian, comedian]"),
    ("seeds: [42, 137, 256]", "seeds: [42]"),
)


def graph_of(study_texts, keep: str, *edits: tuple[str, str]) -> Graph:
    text = study_texts["length_matched"]
    for before, after in (*_EDITS, ("keep: until_evaluated", f"keep: {keep}"), *edits):
        assert before in text
        text = text.replace(before, after)
    return Graph(parse_study(text))


@pytest.fixture(scope="module")
def graph(study_texts) -> Graph:
    return graph_of(study_texts, "until_evaluated")


@pytest.fixture(scope="module")
def landed(graph, tmp_path_factory) -> Path:
    """The root of a store in which the whole study has landed."""
    root = tmp_path_factory.mktemp("store")
    land_everything(graph, Store(root, "length_matched"))
    return root


@pytest.fixture
def store(landed, tmp_path) -> Store:
    """A copy of it."""
    shutil.copytree(landed, tmp_path / "store")
    return Store(tmp_path / "store", "length_matched")


def states(graph: Graph, store: Store) -> set[str]:
    freshness = Freshness(graph, store)
    return {freshness.state(ref) for a in graph.assets.values() for ref in a.refs()}


def has_files(store: Store, ref: Ref) -> bool:
    return any(path.is_dir() for path in store.folder(ref).iterdir())


def test_what_was_read_is_removed_and_still_counts_as_landed(graph, store):
    before = store.landed(CHECKPOINT)
    assert release_read(graph, store, OUTCOMES) == [CHECKPOINT]
    assert not has_files(store, CHECKPOINT)
    assert has_files(store, OTHER)
    after = store.landed(CHECKPOINT)
    assert after.released
    assert (after.files, after.data_version) == (before.files, before.data_version)
    assert after.provenance == before.provenance
    assert states(graph, store) == {"fresh"}
    why = Freshness(graph, store).why(CHECKPOINT)
    assert why == f"{CHECKPOINT} is up to date; its files were removed after use"
    assert Freshness(graph, store).reasons(CHECKPOINT) == []


def test_every_cell_that_was_evaluated_is_released_and_no_trained_one(graph, store):
    carried = [Ref("checkpoint", cell.key) for cell in graph.study.cells_of("carry_over")]
    (store.folder(OUTCOMES) / "manifest.json").unlink()
    assert release_read(graph, store) == [ref for ref in carried if ref != CHECKPOINT]
    assert {ref for ref in carried if has_files(store, ref)} == {CHECKPOINT}
    assert has_files(store, TRAINED)


def test_a_study_that_keeps_its_checkpoints_keeps_them(study_texts, store):
    assert release_read(graph_of(study_texts, "always"), store) == []
    assert has_files(store, CHECKPOINT)


def test_outcomes_that_failed_their_checks_release_nothing(graph, store):
    failed = audit("coverage", False, observed="", threshold="", remedy="")
    land(graph, store, OUTCOMES, audits=[failed])
    assert release_read(graph, store, OUTCOMES) == []
    assert has_files(store, CHECKPOINT)


def test_reading_what_was_released_names_what_to_materialize(graph, store):
    release_read(graph, store, OUTCOMES)
    for read in (store.directory, lambda ref: store.path(ref, "file")):
        with pytest.raises(StoreError, match="were removed after use") as error:
            read(CHECKPOINT)
        assert f"Materialize {CHECKPOINT} again" in str(error.value)


@pytest.mark.parametrize("asked_first", [CHECKPOINT, OUTCOMES])
@pytest.mark.parametrize("why", ["scaffold", "missing", "failed"])
def test_an_evaluation_that_is_due_again_needs_the_files_again(
    graph, store, study_texts, why, asked_first
):
    """Whichever partition is asked for first, the two are told the same way."""
    release_read(graph, store)
    if why == "scaffold":
        edit = ("scaffolds: [no_cot, generic_cot,", "scaffolds: [no_cot,")
        graph = graph_of(study_texts, "until_evaluated", edit)
    elif why == "missing":
        (store.folder(OUTCOMES) / "manifest.json").unlink()
    else:
        failed = audit("coverage", False, observed="", threshold="", remedy="")
        land(graph, store, OUTCOMES, audits=[failed])
    freshness = Freshness(graph, store)
    freshness.state(asked_first)
    assert freshness.state(CHECKPOINT) == "missing"
    assert freshness.why(CHECKPOINT) == (
        f"the files of {CHECKPOINT} were removed after use, and {OUTCOMES} needs them again"
    )
    assert freshness.blockers(OUTCOMES)[CHECKPOINT] == freshness.why(CHECKPOINT)
    told = {"scaffold": "stale", "missing": "missing", "failed": "failed"}[why]
    assert freshness.state(OUTCOMES) == told
    other = "missing" if why == "scaffold" else "fresh"
    assert freshness.state(OTHER) == other
    # Fetched again, it is no longer in the way, and nobody else is concerned.
    if why != "scaffold":
        land(graph, store, CHECKPOINT)
        assert Freshness(graph, store).state(CHECKPOINT) == "fresh"
        assert Freshness(graph, store).blockers(OUTCOMES) == {}
        land(graph, store, OUTCOMES)
        assert states(graph, store) == {"fresh"}
        assert release_read(graph, store, OUTCOMES) == [CHECKPOINT]
        assert not has_files(store, CHECKPOINT)


def test_a_study_that_keeps_them_from_now_on_wants_them_back(graph, store, study_texts):
    release_read(graph, store, OUTCOMES)
    keeps = graph_of(study_texts, "always")
    freshness = Freshness(keeps, store)
    assert freshness.state(CHECKPOINT) == "missing"
    assert freshness.why(CHECKPOINT).endswith(
        "were removed after use, and the study keeps them now"
    )
    land(keeps, store, CHECKPOINT)
    assert Freshness(keeps, store).state(OUTCOMES) == "fresh"


def test_keeping_or_not_is_no_input_of_a_checkpoint(graph, store, study_texts):
    keeps = Freshness(graph_of(study_texts, "always"), store)
    assert keeps.state(CHECKPOINT) == keeps.state(OUTCOMES) == "fresh"


@pytest.mark.parametrize("moment", ["before", "between", "half-way"])
def test_killed_while_releasing_the_next_call_finishes(graph, store, monkeypatch, moment):
    version = store.folder(CHECKPOINT) / store.landed(CHECKPOINT).version

    class Killed(BaseException):
        """The process's end."""

    def die(path):
        if moment == "half-way":
            (path / "file").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr("persona_assets.store.write_atomically", lambda *_: die(version))
        else:
            patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            release_read(graph, store, OUTCOMES)
    assert version.is_dir()
    assert store.landed(CHECKPOINT).released == (moment != "before")
    assert states(graph, store) == {"fresh"}
    assert release_read(graph, store, OUTCOMES) == [CHECKPOINT]
    assert not has_files(store, CHECKPOINT)
    assert states(graph, store) == {"fresh"}


def test_earlier_versions_go_as_well(graph, store):
    old = store.folder(CHECKPOINT) / store.landed(CHECKPOINT).version
    land(graph, store, CHECKPOINT, "other content")
    land(graph, store, OUTCOMES)
    assert old.is_dir()
    assert release_read(graph, store, OUTCOMES) == [CHECKPOINT]
    assert not has_files(store, CHECKPOINT)


def test_what_is_made_again_meanwhile_is_not_released(graph, store):
    """Its outcomes are then stale, and read it once more."""
    with ThreadPoolExecutor(1) as pool:
        with store.turn(CHECKPOINT):
            releasing = pool.submit(release_read, graph, store, OUTCOMES)
            with pytest.raises(TimeoutError):
                releasing.result(timeout=0.5)
            land(graph, store, CHECKPOINT, "other content")
        assert releasing.result(timeout=60) == []
    assert has_files(store, CHECKPOINT)


def test_files_that_cannot_be_removed_are_named(graph, store, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match="cannot be cleared of released files") as error:
        release_read(graph, store, OUTCOMES)
    assert str(store.folder(CHECKPOINT)) in str(error.value)
