"""The graph table, and staleness that is exact."""

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
from persona_assets.store import Provenance, Ref, Store
from persona_assets.study import load_study, parse_study
from persona_assets_tests.conftest import PROJECT

MINI = Graph(load_study(PROJECT / "data" / "studies" / "mini.yaml"))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return MINI


def land(graph: Graph, store: Store, ref: Ref, content: str = "content", audits=()) -> None:
    """Land a partition as its asset would, with ``content`` for its data."""
    freshness = Freshness(graph, store)
    with store.draft(ref) as draft:
        (draft / "file").write_text(f"{ref} {content}")
        store.land(
            ref,
            draft,
            audits=audits,
            provenance=Provenance("run", freshness.inputs(ref), graph.study.content_hash),
        )


def land_everything(graph: Graph, store: Store) -> None:
    for asset in graph.assets.values():
        for ref in asset.refs():
            land(graph, store, ref)


def stale(graph: Graph, store: Store) -> dict[str, set[str | None]]:
    """The partitions that are not fresh, by asset."""
    freshness = Freshness(graph, store)
    return {
        name: keys
        for name, asset in graph.assets.items()
        if (keys := {ref.key for ref in asset.refs() if freshness.state(ref) != "fresh"})
    }


def changed(study_text: str, before: str, after: str) -> Graph:
    assert before in study_text
    return Graph(parse_study(study_text.replace(before, after)))


def test_every_edge_leads_to_a_partition_of_an_earlier_asset(graph, length_matched):
    for each in (graph, Graph(length_matched)):
        seen: set[str] = set()
        for name, asset in each.assets.items():
            for ref in asset.refs():
                for upstream in each.upstream(ref):
                    assert upstream.asset in seen, (ref, upstream)
                    assert upstream in each.assets[upstream.asset].refs(), (ref, upstream)
            seen.add(name)


def test_partitions_follow_the_grid(graph, length_matched):
    counts = {name: len(a.keys) for name, a in graph.assets.items() if a.keys is not None}
    assert counts == {
        "rationales": 22,
        "training_dataset": 66,
        "prior_checkpoint": 27,
        "prior_accuracies": 27,
        "cell_diagnostics": 66,
        "checkpoint": 66,
        "cell_outcomes": 66,
        "contrast_estimate": 8,
    }
    assert "prior_checkpoint" not in Graph(length_matched).assets


def test_only_trained_checkpoints_are_made_from_datasets(graph, mini):
    mapping = graph.key_mapping("checkpoint", "training_dataset")
    assert mapping == {cell.key: {cell.key} for cell in mini.cells_of("trained")}
    prior = graph.key_mapping("checkpoint", "prior_checkpoint")
    assert prior == {cell.key: {cell.key} for cell in mini.cells_of("carry_over")}


def test_a_study_may_train_every_arm_itself(study_texts, tmp_path):
    graph = Graph(parse_study(study_texts["mini"].replace("origin: carry_over", "origin: trained")))
    assert "prior_checkpoint" not in graph.assets
    assert graph.ancestors("report") == graph.assets.keys()
    assert len(graph.assets["checkpoint"].keys) == 66
    land_everything(graph, Store(tmp_path, "mini"))
    assert stale(graph, Store(tmp_path, "mini")) == {}


def test_a_contrast_is_made_from_exactly_its_cells(graph, mini):
    for contrast in mini.contrast_list:
        upstream = graph.upstream(Ref("contrast_estimate", contrast.key))
        cells = {ref.key for ref in upstream if ref.asset == "cell_outcomes"}
        assert cells == {cell.key for cell in mini.contrast_cells(contrast)}


def test_what_stands_on_what_has_not_landed_has_no_inputs_yet(graph, tmp_path):
    freshness = Freshness(graph, Store(tmp_path, "mini"))
    assert freshness.state(Ref("tokenizer")) == "missing"
    with pytest.raises(KeyError, match="tokenizer"):
        freshness.inputs(Ref("base_model"))


@pytest.fixture(scope="module")
def landed(graph, tmp_path_factory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"), "mini")
    land_everything(graph, store)
    return store


def test_everything_landed_is_fresh(graph, landed):
    assert stale(graph, landed) == {}


def test_changed_training_recipe_stales_trained_cells_only(landed, study_texts, mini):
    # The anchor is shared by both recipes: write the prior one out before changing the other.
    text = study_texts["mini"].replace("prior_training: *recipe", "prior_training: *prior")
    recipe = "{rank: 16, alpha: 32, learning_rate: 2.0e-3, epochs: 4, dtype: float32}"
    text = text.replace("training: &recipe\n", "x: 1\ntraining: &recipe\n").replace("x: 1\n", "")
    text = text.replace("prior_training: *prior", f"prior_training: {recipe}")
    graph = changed(text, "  epochs: 4\n", "  epochs: 5\n")
    trained = {cell.key for cell in mini.cells_of("trained")}
    found = stale(graph, landed)
    assert found["checkpoint"] == found["cell_outcomes"] == trained
    assert not {"training_dataset", "rationales", "prior_checkpoint"} & found.keys()


def test_added_persona_stales_evaluations_only(landed, study_texts, mini):
    graph = changed(
        study_texts["mini"],
        "  villain:",
        "  pilot: You are a pilot who flies planes.\n  villain:",
    )
    found = stale(graph, landed)
    evaluations = {"baseline_outcomes", "cell_outcomes", "prior_accuracies", "cell_diagnostics"}
    groups = {graph.assets[name].group for name in found.keys() - evaluations}
    assert groups == {"analysis", "report"}
    assert found["cell_outcomes"] == {cell.key for cell in mini.cells}
    assert found["baseline_outcomes"] == {None}
    why = Freshness(graph, landed).why(Ref("baseline_outcomes"))
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
    real, real_landed, graph, landed, monkeypatch, construction
):
    monkeypatch.setitem(CONSTRUCTIONS, construction, lambda batch: [])
    arm = {"garbage": "garbage_cot", "scrambled": "scrambled_english_cot"}[construction]
    for each, store in ((real, real_landed), (graph, landed)):
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


def test_modules_that_make_a_row_are_among_its_inputs(real):
    dataset = real.assets["training_dataset"].sources("librarian.garbage_cot.42")
    assert {
        "chat.py",
        "questions/bank.py",
        "training/audit_text.py",
        "training/dataset.py",
        "training/encoding.py",
        "assistant_turn",
        "Scaffold",
        "unscored",
    } <= dataset.keys()
    filler = real.assets["rationales"].sources("librarian.garbage_cot")
    assert {"construction garbage", "list of English words", "phrases, neutral"} <= filler.keys()
    written = real.assets["rationales"].sources("librarian.generic_cot")
    assert "construction garbage" not in written
    assert {"questions/arc.py", "questions/bank.py"} <= real.assets["question_bank"].sources(
        None
    ).keys()


@pytest.mark.parametrize("name", MINI.assets)
def test_a_raised_code_version_stales_every_partition(graph, landed, name):
    raised = Graph(graph.study)
    before = graph.assets[name].code_version
    asset = replace(graph.assets[name], code_version=f"{before}.1")
    raised.__dict__["assets"] = {**graph.assets, name: asset}
    found = stale(raised, landed)
    assert found[name] == {ref.key for ref in asset.refs()}
    reasons = Freshness(raised, landed).reasons(asset.refs()[0])
    assert reasons == [f'code_version was "{before}" and is "{before}.1"']


def test_changed_title_stales_what_shows_it_only(landed, study_texts):
    graph = changed(study_texts["mini"], "title: Miniature", "title: Small")
    assert stale(graph, landed).keys() == {"number_ledger", "warehouse", "report"}


def test_batch_size_stales_what_is_measured_only(landed, study_texts, mini):
    """Rounding depends on what shares a batch: log-probabilities differ in their last bits."""
    graph = changed(study_texts["mini"], "batch_size: 256", "batch_size: 128")
    found = stale(graph, landed)
    assert found["cell_outcomes"] == {cell.key for cell in mini.cells}
    made = {"base_model", "rationales", "training_dataset", "prior_checkpoint", "checkpoint"}
    assert not made & found.keys()


def test_missing_and_damaged_files_count_as_missing(graph, tmp_path):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    gone, cut = (Ref("cell_outcomes", f"librarian.garbage_cot.{seed}") for seed in (42, 137))
    for ref in (gone, cut):
        (path,) = store.folder(ref).glob("*/file")
        path.unlink() if ref is gone else path.write_text("x")
    (store.folder(Ref("loss_heatmap")) / "manifest.json").write_text("{")
    freshness = Freshness(graph, store)
    assert [freshness.state(ref) for ref in (gone, cut)] == ["missing", "missing"]
    assert "is missing" in freshness.why(gone)
    assert "has 1 bytes" in freshness.why(cut)
    assert freshness.state(Ref("loss_heatmap")) == "missing"
    assert "damaged" in freshness.why(Ref("loss_heatmap"))


def test_blockers_are_the_roots_of_what_is_not_fresh(graph, tmp_path):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    cell = "librarian.garbage_cot.42"
    land(graph, store, Ref("rationales", "librarian.garbage_cot"), "other text")
    freshness = Freshness(graph, store)
    assert list(freshness.blockers(Ref("cell_outcomes", cell))) == [Ref("training_dataset", cell)]
    assert freshness.blockers(Ref("training_dataset", cell)) == {}


def test_local_files_are_inputs(length_matched, tmp_path, monkeypatch):
    graph = Graph(length_matched)
    settings = graph.assets["question_bank"].settings
    monkeypatch.delenv("PERSONA_ASSETS_ARC_DIR", raising=False)
    without = settings(None)
    monkeypatch.setenv("PERSONA_ASSETS_ARC_DIR", str(tmp_path))
    (tmp_path / "ARC-Challenge-Test.jsonl").write_text("one")
    one = settings(None)
    (tmp_path / "ARC-Challenge-Test.jsonl").write_text("two")
    assert len({str(without), str(one), str(settings(None))}) == 3


def test_a_name_finds_its_partitions(graph):
    cell = "librarian.persona_cot.42"
    of_cell = ("training_dataset", "prior_checkpoint", "prior_accuracies", "checkpoint")
    evaluated = ("cell_outcomes", "cell_diagnostics")
    assert graph.find(cell) == (
        Ref("rationales", "librarian.persona_cot"),
        *(Ref(asset, cell) for asset in (*of_cell, *evaluated)),
    )
    assert graph.find("report") == (Ref("report"),)
    assert graph.find(f"checkpoint[{cell}]") == (Ref("checkpoint", cell),)
    assert len(graph.find("checkpoint")) == 66
    with pytest.raises(
        KeyError, match=r"no cell, asset or partition 'librarian.persona_cot.43'. Did"
    ):
        graph.find("librarian.persona_cot.43")


def test_ancestors_are_what_an_asset_is_made_from(graph):
    data = {"tokenizer", "question_bank", "rationales", "training_dataset"}
    assert graph.ancestors("training_dataset") == data
    assert graph.ancestors("checkpoint") == data | {"base_model", "prior_checkpoint", "checkpoint"}
    assert "prior_accuracies" not in graph.ancestors("cell_outcomes")
    with pytest.raises(KeyError, match=r"no asset 'checkpoints'\. Did you mean 'checkpoint'"):
        graph.ancestors("checkpoints")


def test_reasons_name_what_came_to_a_list_and_what_went(landed, study_texts):
    text = study_texts["mini"].replace(
        "\narms:", "\ndefine: {scaffolds: {own: {tag: thinking, generates: true}}}\narms:"
    )
    edited = Freshness(Graph(parse_study(text.replace("empty_persona_cot]", "own]"))), landed)
    reasons = edited.reasons(Ref("baseline_outcomes"))
    gone, came = reasons
    assert gone.startswith("scaffolds.empty_persona_cot was {")
    assert gone.endswith(" and is null")
    assert came.startswith("scaffolds.own was null and is {")
    pilot = "  pilot: You are a pilot who flies planes.\n  villain: You"
    edited = Freshness(
        Graph(parse_study(study_texts["mini"].replace("  villain: You", pilot))), landed
    )
    assert edited.reasons(Ref("loss_matrix"))[0] == 'personas gained ["pilot"]'


def test_reasons_name_every_root_and_every_changed_input(graph, tmp_path, study_texts):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    cell = "librarian.garbage_cot.42"
    assert Freshness(graph, store).reasons(Ref("checkpoint", cell)) == []
    land(graph, store, Ref("training_dataset", cell), "other rows")
    text = study_texts["mini"].replace("learning_rate: 2.0e-3", "learning_rate: 1.0e-3")
    edited = Freshness(Graph(parse_study(text)), store)
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


def test_same_content_again_stales_nothing(graph, tmp_path):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    land(graph, store, Ref("training_dataset", "librarian.garbage_cot.42"))
    assert stale(graph, store) == {}


def test_other_content_stales_exactly_what_is_made_from_it(graph, tmp_path, mini):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    cell = "librarian.garbage_cot.42"
    land(graph, store, Ref("training_dataset", cell), "other rows")
    found = stale(graph, store)
    assert found["checkpoint"] == found["cell_outcomes"] == {cell}
    assert found["contrast_estimate"] == {
        c.key for c in mini.contrast_list if "garbage_cot" in (c.a, c.b)
    }
    assert "training_dataset" not in found
    why = Freshness(graph, store).why(Ref("cell_outcomes", cell))
    changed = f"training_dataset[{cell}] has other content"
    assert why == f"checkpoint[{cell}] was made from other inputs: {changed}"


def test_failed_blocking_check_makes_a_partition_unusable(graph, tmp_path):
    store = Store(tmp_path, "mini")
    land_everything(graph, store)
    cell = "librarian.garbage_cot.42"
    wrong = audit("letter_balance", False, observed="1", threshold="0", remedy="mend")
    land(graph, store, Ref("training_dataset", cell), audits=[wrong])
    freshness = Freshness(graph, store)
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
    assert set(stale(study, store)) == {"number_ledger", "warehouse", "report"}
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
        *("vocabulary_leakage", "number_ledger", "warehouse", "report")
    }


def test_every_module_that_an_asset_is_made_by_is_there():
    for asset in code_sources._MODULES:
        hashes = code_sources.code_sources(asset)
        assert len(hashes) >= 2, asset
        assert asset in MINI.assets
    assert {"report.html.j2", "report.md.j2", "report.css.j2"} <= set(
        code_sources.code_sources("report")
    )
