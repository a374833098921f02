"""Staleness that is exact: what an edit makes again, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from persona_assets import code_sources, environment
from persona_assets.audit import audit
from persona_assets.evaluation.scaffolds import SCAFFOLDS
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.rationales import methods
from persona_assets.rationales.arms import ARMS
from persona_assets.rationales.methods import CONSTRUCTIONS
from persona_assets.rationales.phrases import NEUTRAL, VOICES
from persona_assets.store import Ref, Store
from persona_assets.study import parse_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.landed import MINI, changed, land, land_everything, stale


@pytest.fixture(scope="module")
def graph() -> Graph:
    return MINI


def test_what_stands_on_what_has_not_landed_has_no_inputs_yet(graph, tmp_path):
    freshness = Freshness(graph, Store(tmp_path, "mini"))
    assert freshness.state(Ref("tokenizer")) == "missing"
    with pytest.raises(KeyError, match="tokenizer"):
        freshness.inputs(Ref("base_model"))


def test_everything_landed_is_fresh(graph, mini_store):
    assert stale(graph, mini_store) == {}


def test_changed_training_recipe_stales_trained_cells_only(mini_store, study_texts, mini):
    # The anchor is shared by both recipes: write the prior one out before changing the other.
    text = study_texts["mini"].replace("prior_training: *recipe", "prior_training: *prior")
    recipe = "{rank: 16, alpha: 32, learning_rate: 2.0e-3, epochs: 4, dtype: float32}"
    text = text.replace("training: &recipe\n", "x: 1\ntraining: &recipe\n").replace("x: 1\n", "")
    text = text.replace("prior_training: *prior", f"prior_training: {recipe}")
    graph = changed(text, "  epochs: 4\n", "  epochs: 5\n")
    trained = {cell.key for cell in mini.cells_of("trained")}
    found = stale(graph, mini_store)
    assert found["checkpoint"] == found["cell_outcomes"] == trained
    assert not {"training_dataset", "rationales", "prior_checkpoint"} & found.keys()


def test_added_persona_stales_evaluations_only(mini_store, study_texts, mini):
    graph = changed(
        study_texts["mini"],
        "  villain:",
        "  pilot: You are a pilot who flies planes.\n  villain:",
    )
    found = stale(graph, mini_store)
    evaluations = {"baseline_outcomes", "cell_outcomes", "prior_accuracies", "cell_diagnostics"}
    groups = {graph.assets[name].group for name in found.keys() - evaluations}
    assert groups == {"analysis", "report", "publish"}
    assert found["cell_outcomes"] == {cell.key for cell in mini.cells}
    assert found["baseline_outcomes"] == {None}
    why = Freshness(graph, mini_store).why(Ref("baseline_outcomes"))
    assert 'personas.pilot was null and is "You are a pilot who flies planes."' in why


@pytest.fixture(scope="module")
def real(length_matched) -> Graph:
    return Graph(length_matched)


@pytest.fixture(scope="module")
def real_landed(real, tmp_path_factory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"), "length_matched")
    with pytest.MonkeyPatch.context() as patch:
        for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR):
            patch.delenv(variable, raising=False)
        land_everything(real, store)
    return store


@pytest.fixture
def hub_only(monkeypatch):
    for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR):
        monkeypatch.delenv(variable, raising=False)


def cells_of(study, *conditions: str) -> set[str]:
    return {cell.key for cell in study.cells if cell.condition in conditions}


def is_exactly_stale(graph: Graph, store: Store, conditions: set[str]) -> None:
    """These conditions are stale from their rationales on, and no other partition of a cell."""
    found, cells = stale(graph, store), cells_of(graph.study, *conditions)
    assert found["rationales"] == conditions
    assert found["training_dataset"] == cells
    trained = {cell.key for cell in graph.study.cells_of("trained")}
    assert found.get("checkpoint", set()) == cells & trained
    assert found.get("cell_outcomes", set()) == cells & trained
    assert not {"tokenizer", "question_bank", "base_model", "baseline_outcomes"} & found.keys()


@pytest.mark.usefixtures("hub_only")
def test_a_reworded_voice_stales_what_is_written_in_it_only(real, real_landed, monkeypatch):
    reworded = replace(VOICES["librarian"], closings=("Bzzt, the index says so.",))
    monkeypatch.setitem(VOICES, "librarian", reworded)
    arms = ("persona_cot", "contradicting_cot", "persona_cot_correct")
    is_exactly_stale(real, real_landed, {f"librarian.{arm}" for arm in arms})
    cell = "librarian.contradicting_cot.42"
    why = Freshness(real, real_landed).why(Ref("cell_outcomes", cell))
    assert why == (
        "rationales[librarian.contradicting_cot] was made from other inputs: the source of "
        "phrases, librarian changed"
    )


@pytest.mark.parametrize("construction", ["garbage", "scrambled"])
@pytest.mark.usefixtures("hub_only")
def test_a_changed_construction_stales_its_arm_only(
    real, real_landed, graph, mini_store, monkeypatch, construction
):
    monkeypatch.setitem(CONSTRUCTIONS, construction, lambda batch: [])
    arm = {"garbage": "garbage_cot", "scrambled": "scrambled_english_cot"}[construction]
    for each, store in ((real, real_landed), (graph, mini_store)):
        is_exactly_stale(each, store, {f"{source}.{arm}" for source in each.study.sources})


@pytest.mark.usefixtures("hub_only")
def test_a_changed_arm_stales_its_cells_only(real, real_landed, monkeypatch):
    garbage = ARMS["garbage_cot"]
    monkeypatch.setitem(ARMS, "garbage_cot", replace(garbage, scaffold=SCAFFOLDS["persona_cot"]))
    arm = {f"{source}.garbage_cot" for source in real.study.sources}
    is_exactly_stale(real, real_landed, arm)


@pytest.mark.usefixtures("hub_only")
def test_a_reworded_reference_concerns_every_row_that_is_held_against_it(
    real, real_landed, monkeypatch
):
    """Token budgets are matched to it; where rows come out as they were, nothing is retrained."""
    monkeypatch.setattr(methods, "NEUTRAL", replace(NEUTRAL, closings=("So be it.",)))
    assert stale(real, real_landed)["rationales"] == set(real.study.conditions)


@pytest.mark.parametrize(
    ("module", "name", "assets"),
    [
        ("rationales.methods", "STOP_WORDS", {"rationales", "training_dataset"}),
        ("rationales.methods", "ANCHOR", {"rationales", "training_dataset"}),
        ("asset_table", "unscored", {"training_dataset"}),
    ],
)
@pytest.mark.usefixtures("hub_only")
def test_what_makes_a_row_is_among_its_inputs(real, real_landed, monkeypatch, module, name, assets):
    other = {"STOP_WORDS": frozenset(), "ANCHOR": "So:", "unscored": lambda arm, turn: ""}[name]
    monkeypatch.setattr(f"persona_assets.{module}.{name}", other)
    assert assets <= stale(real, real_landed).keys()


@pytest.mark.parametrize("name", MINI.assets)
def test_a_raised_code_version_stales_every_partition(graph, mini_store, name):
    raised = Graph(graph.study)
    before = graph.assets[name].code_version
    asset = replace(graph.assets[name], code_version=f"{before}.1")
    raised.__dict__["assets"] = {**graph.assets, name: asset}
    found = stale(raised, mini_store)
    assert found[name] == {ref.key for ref in asset.refs()}
    reasons = Freshness(raised, mini_store).reasons(asset.refs()[0])
    assert reasons == [f'code_version was "{before}" and is "{before}.1"']


def test_changed_title_stales_what_shows_it_only(mini_store, study_texts):
    graph = changed(study_texts["mini"], "title: Miniature", "title: Small")
    shows = {"number_ledger", "warehouse", "report", "wandb_bundle"}
    assert stale(graph, mini_store).keys() == shows


def test_batch_size_stales_what_is_measured_only(mini_store, study_texts, mini):
    """Rounding depends on what shares a batch: log-probabilities differ in their last bits."""
    graph = changed(study_texts["mini"], "batch_size: 256", "batch_size: 128")
    found = stale(graph, mini_store)
    assert found["cell_outcomes"] == {cell.key for cell in mini.cells}
    made = {"base_model", "rationales", "training_dataset", "prior_checkpoint", "checkpoint"}
    assert not made & found.keys()


def test_missing_and_damaged_files_count_as_missing(graph, own_mini_store):
    gone, cut = (Ref("cell_outcomes", f"librarian.garbage_cot.{seed}") for seed in (42, 137))
    for ref in (gone, cut):
        (path,) = own_mini_store.folder(ref).glob("*/file")
        path.unlink() if ref is gone else path.write_text("x")
    (own_mini_store.folder(Ref("loss_heatmap")) / "manifest.json").write_text("{")
    freshness = Freshness(graph, own_mini_store)
    assert [freshness.state(ref) for ref in (gone, cut)] == ["missing", "missing"]
    assert "is missing" in freshness.why(gone)
    assert "has 1 bytes" in freshness.why(cut)
    assert freshness.state(Ref("loss_heatmap")) == "missing"
    assert "damaged" in freshness.why(Ref("loss_heatmap"))


def test_blockers_are_the_roots_of_what_is_not_fresh(graph, own_mini_store):
    cell = "librarian.garbage_cot.42"
    land(graph, own_mini_store, Ref("rationales", "librarian.garbage_cot"), "other text")
    freshness = Freshness(graph, own_mini_store)
    assert list(freshness.blockers(Ref("cell_outcomes", cell))) == [Ref("training_dataset", cell)]
    assert freshness.blockers(Ref("training_dataset", cell)) == {}


def test_reasons_name_what_came_to_a_list_and_what_went(mini_store, study_texts):
    text = study_texts["mini"].replace(
        "\narms:", "\ndefine: {scaffolds: {own: {tag: thinking, generates: true}}}\narms:"
    )
    edited = Freshness(Graph(parse_study(text.replace("empty_persona_cot]", "own]"))), mini_store)
    reasons = edited.reasons(Ref("baseline_outcomes"))
    gone, came = reasons
    assert gone.startswith("scaffolds.empty_persona_cot was {")
    assert gone.endswith(" and is null")
    assert came.startswith("scaffolds.own was null and is {")
    pilot = "  pilot: You are a pilot who flies planes.\n  villain: You"
    edited = Freshness(
        Graph(parse_study(study_texts["mini"].replace("  villain: You", pilot))), mini_store
    )
    assert edited.reasons(Ref("loss_matrix"))[0] == 'personas gained ["pilot"]'


def test_reasons_name_every_root_and_every_changed_input(
    graph, own_mini_store, tmp_path, study_texts
):
    cell = "librarian.garbage_cot.42"
    assert Freshness(graph, own_mini_store).reasons(Ref("checkpoint", cell)) == []
    land(graph, own_mini_store, Ref("training_dataset", cell), "other rows")
    text = study_texts["mini"].replace("learning_rate: 2.0e-3", "learning_rate: 1.0e-3")
    edited = Freshness(Graph(parse_study(text)), own_mini_store)
    assert edited.reasons(Ref("checkpoint", cell)) == [
        "recipe.learning_rate was 0.002 and is 0.001",
        f"training_dataset[{cell}] has other content",
    ]
    assert edited.reasons(Ref("cell_outcomes", cell)) == [
        f"checkpoint[{cell}] was made from other inputs: recipe.learning_rate was 0.002 and is "
        "0.001 and 1 more"
    ]
    empty = Freshness(graph, Store(tmp_path / "empty", "mini"))
    assert empty.reasons(Ref("checkpoint", cell)) == [
        f"checkpoint[{cell}] has not landed",
        "tokenizer has not landed",
        "question_bank has not landed",
    ]


def test_same_content_again_stales_nothing(graph, own_mini_store):
    land(graph, own_mini_store, Ref("training_dataset", "librarian.garbage_cot.42"))
    assert stale(graph, own_mini_store) == {}


def test_other_content_stales_exactly_what_is_made_from_it(graph, own_mini_store, mini):
    cell = "librarian.garbage_cot.42"
    land(graph, own_mini_store, Ref("training_dataset", cell), "other rows")
    found = stale(graph, own_mini_store)
    assert found["checkpoint"] == found["cell_outcomes"] == {cell}
    assert found["contrast_estimate"] == {
        c.key for c in mini.contrast_list if "garbage_cot" in (c.a, c.b)
    }
    assert "training_dataset" not in found
    why = Freshness(graph, own_mini_store).why(Ref("cell_outcomes", cell))
    changed = f"training_dataset[{cell}] has other content"
    assert why == f"checkpoint[{cell}] was made from other inputs: {changed}"


def test_failed_blocking_check_makes_a_partition_unusable(graph, own_mini_store):
    cell = "librarian.garbage_cot.42"
    wrong = audit("letter_balance", False, observed="1", threshold="0", remedy="mend")
    land(graph, own_mini_store, Ref("training_dataset", cell), audits=[wrong])
    freshness = Freshness(graph, own_mini_store)
    assert freshness.state(Ref("training_dataset", cell)) == "failed"
    assert freshness.state(Ref("checkpoint", cell)) == "stale"
    assert "letter_balance" in freshness.why(Ref("checkpoint", cell))


def test_failed_warning_leaves_a_partition_usable(graph, tmp_path):
    store = Store(tmp_path, "mini")
    ref = Ref("tokenizer")
    warning = audit("w", False, observed="1", threshold="0", remedy="look", blocking=False)
    land(graph, store, ref, audits=[warning])
    assert Freshness(graph, store).state(ref) == "fresh"


def small() -> Graph:
    """The mini study with two sources."""
    text = (PROJECT / "data" / "studies" / "mini.yaml").read_text("utf-8")
    return changed(
        text,
        "sources: [software_engineer, librarian, comedian, police_officer]",
        "sources: [librarian, comedian]",
    )


def test_another_finding_about_equal_content_stales_what_quotes_it(tmp_path):
    study, store = small(), Store(tmp_path, "mini")
    land_everything(study, store)
    texts = {"observed": "all are A", "threshold": "few", "remedy": "Look."}
    found = audit("letter_collapse", False, blocking=False, **texts)
    cell = Ref("cell_diagnostics", "librarian.garbage_cot.42")
    land(study, store, cell, audits=[found])
    assert set(stale(study, store)) == {"number_ledger", "warehouse", "report", "wandb_bundle"}
    (why,) = Freshness(study, store).changes(Ref("number_ledger"))
    assert why == f"{cell} has other findings of its checks"


def test_what_the_carried_over_cells_were_trained_with_is_compared_anew(
    study_texts, tmp_path, monkeypatch
):
    """The recipe of another's checkpoints is an input of the contrasts' check, and of no cell."""
    for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR):
        monkeypatch.delenv(variable, raising=False)
    text = study_texts["length_matched"].replace("seeds: [42, 137, 256]", "seeds: [42]")
    store = Store(tmp_path, "length_matched")
    land_everything(Graph(parse_study(text)), store)
    other = changed(text, "    rank: 32\n", "    rank: 16\n")
    found = stale(other, store)
    assert found["contrast_estimate"] == {c.key for c in other.study.contrast_list}
    assert not {"checkpoint", "cell_outcomes", "cell_diagnostics", "loss_matrix"} & set(found)


def test_other_code_of_an_analysis_stales_it(tmp_path, monkeypatch):
    study, store = small(), Store(tmp_path, "mini")
    land_everything(study, store)
    hashes = code_sources.module_hashes

    def edited(*names: str) -> dict[str, str]:
        return hashes(*names) | ({"edited": "1"} if "stats.lexicon" in names else {})

    monkeypatch.setattr(code_sources, "module_hashes", edited)
    assert set(stale(small(), store)) == {
        *("vocabulary_leakage", "number_ledger", "warehouse", "report", "wandb_bundle")
    }
