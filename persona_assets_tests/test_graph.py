"""The graph table: which partitions there are, and what each is made from."""

from __future__ import annotations

import pytest

from persona_assets import code_sources
from persona_assets.graph import Graph
from persona_assets.store import Ref, Store
from persona_assets.study import parse_study
from persona_assets_tests.landed import MINI, land_everything, stale


@pytest.fixture(scope="module")
def graph() -> Graph:
    return MINI


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
        "wandb_run": 66,
        "wandb_bundle": 2,
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
    published = {"wandb_run", "wandb_bundle"}
    assert graph.ancestors("report") == graph.assets.keys() - published
    assert len(graph.assets["checkpoint"].keys) == 66
    land_everything(graph, Store(tmp_path, "mini"))
    assert stale(graph, Store(tmp_path, "mini")) == {}


def test_a_contrast_is_made_from_exactly_its_cells(graph, mini):
    for contrast in mini.contrast_list:
        upstream = graph.upstream(Ref("contrast_estimate", contrast.key))
        cells = {ref.key for ref in upstream if ref.asset == "cell_outcomes"}
        assert cells == {cell.key for cell in mini.contrast_cells(contrast)}


def test_modules_that_make_a_row_are_among_its_inputs(length_matched):
    real = Graph(length_matched)
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
    evaluated = ("cell_outcomes", "cell_diagnostics", "wandb_run")
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


def test_every_module_that_an_asset_is_made_by_is_there():
    for asset in code_sources._MODULES:
        hashes = code_sources.code_sources(asset)
        assert len(hashes) >= 2, asset
        assert asset in {*MINI.assets, "hub_upload"}  # for which mini.yaml names no repository
    assert {"report.html.j2", "report.md.j2", "report.css.j2"} <= set(
        code_sources.code_sources("report")
    )
