"""What of a study a repository holds, and what its card says."""

from __future__ import annotations

import re
import shutil

import pytest
import yaml

from persona_assets import publisher
from persona_assets.audit import audit
from persona_assets.graph import Graph
from persona_assets.publishing.hub_card import card
from persona_assets.publishing.hub_content import KINDS, content, held, made_here, repository
from persona_assets.store import Ref, Store, StoreError
from persona_assets.study import parse_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.landed import land, land_everything, stale

STUDIES = PROJECT / "data" / "studies"
HUB = "hub: {dataset: owner/rows, model: owner/adapters%s}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def published(name: str, more: str = "") -> str:
    """A study of the project with repositories to be uploaded to."""
    text = (STUDIES / f"{name}.yaml").read_text("utf-8")
    text = re.sub(r"^publish: .*\n", "", text, flags=re.MULTILINE)
    return f"{text}\npublish: {{{HUB % more}}}\n"


MINI_TEXT = published("mini")
MINI = parse_study(MINI_TEXT)
REAL = parse_study(published("length_matched", ", license: cc-by-sa-4.0"))


@pytest.fixture(scope="module")
def landed(tmp_path_factory) -> Store:
    store = Store(tmp_path_factory.mktemp("landed"), MINI.name)
    land_everything(Graph(MINI), store)
    return store


def sections(files: dict) -> tuple[dict, dict[str, str]]:
    """A card's front matter, and its sections by heading."""
    _, front, body = files["README.md"].decode().split("---\n", 2)
    parts = re.split(r"^## (.+)\n", body, flags=re.MULTILINE)
    return yaml.safe_load(front), dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str) -> list[dict]:
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_the_models_repository_has_a_folder_for_each_cell(landed):
    files = content(MINI, landed, "model")
    cells = {f"{cell.key}/file" for cell in MINI.cells}
    assert files.keys() == cells | {"study/mini.yaml", "README.md"}
    assert len(cells) == 66
    for cell in MINI.cells:
        path = landed.path(Ref("checkpoint", cell.key), "file")
        assert files[f"{cell.key}/file"] == path
    own = repository(MINI, "model").own
    assert [path for path in files if not own.fullmatch(path)] == ["study/mini.yaml", "README.md"]


def test_the_datasets_repository_has_a_table_for_each_cell(landed):
    files = content(MINI, landed, "dataset")
    assert len([path for path in files if path.startswith("training_dataset/")]) == 66
    assert files["training_dataset/librarian.garbage_cot.42.parquet"] == landed.path(
        Ref("training_dataset", "librarian.garbage_cot.42"), "file"
    )
    assert files["report/file"] == landed.path(Ref("report"), "file")
    own = repository(MINI, "dataset").own
    assert own.fullmatch("training_dataset/librarian.garbage_cot.42.parquet")
    assert own.fullmatch("report/file")
    assert not own.fullmatch("README.md")


def test_the_studys_definition_is_the_study(landed):
    text = content(MINI, landed, "model")["study/mini.yaml"].decode()
    assert parse_study(text).content_hash == MINI.content_hash
    assert "owner/" not in text


def test_a_damaged_file_is_not_uploaded(landed):
    ref = Ref("checkpoint", MINI.cells[0].key)
    path = landed.path(ref, "file")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"?")
    try:
        with pytest.raises(StoreError, match=r"SHA-256 .* its manifest says"):
            content(MINI, landed, "model")
    finally:
        path.write_bytes(whole)


def test_checkpoints_of_another_experiment_are_not_uploaded():
    """Merged models of 15 GB, and not the study's own."""
    cells = [cell.key for cell in made_here(REAL)]
    assert cells == [cell.key for cell in REAL.cells_of("trained")]
    assert {ref.key for ref in held(REAL, "model")} == set(cells)
    assert {ref.asset for ref in held(REAL, "model")} == {"checkpoint"}
    assert {ref.key for ref in held(REAL, "dataset")} >= {cell.key for cell in REAL.cells}


def test_an_upload_is_made_from_what_it_holds(landed):
    graph = Graph(MINI)
    cells = [cell.key for cell in MINI.cells]
    assert graph.key_mapping("hub_upload", "checkpoint") == {key: {"model"} for key in cells}
    rows = graph.key_mapping("hub_upload", "training_dataset")
    assert rows == {key: {"dataset"} for key in cells}
    for kind in KINDS:
        assert graph.upstream(Ref("hub_upload", kind)) == held(MINI, kind)
    private = parse_study(MINI_TEXT.replace("owner/rows", "owner/other"))
    assert stale(Graph(private), landed) == {"hub_upload": set(KINDS)}


def test_a_cell_that_failed_a_blocking_check_holds_its_repository_back(landed, tmp_path):
    shutil.copytree(landed.root, tmp_path / MINI.name)
    graph, store = Graph(MINI), Store(tmp_path, MINI.name)
    assert [unit.key for unit in publisher.plan(graph, store, ["hub"]).units] == [*KINDS]
    ref = Ref("training_dataset", "librarian.persona_cot.42")  # no checkpoint is made from it
    texts = {"observed": "two", "threshold": "one", "remedy": "Look."}
    land(graph, store, ref, audits=[audit("rows_valid", False, **texts)])
    todo = publisher.plan(graph, store, ["hub"])
    assert [unit.key for unit in todo.units] == ["model"]
    (why,) = todo.left_out
    assert why.startswith(f"hub_upload[dataset] ({ref} failed its blocking checks: rows_valid")


def test_the_card_says_what_it_is_and_what_not(landed):
    front, parts = sections(content(MINI, landed, "model"))
    assert front == {"tags": ["persona_assets", "mini"], "library_name": "peft"}
    assert "supports no scientific claim" in parts["Limits"]
    assert "None is granted" in parts["Licence"]
    assert "66 in all (39 trained here, 27 carried over)" in parts["Grid"]
    assert blocks(parts["Base model and questions"]) == [
        {name: MINI.content[name] for name in ("seed", "base_model", "questions")}
    ]
    assert blocks(parts["Training"]) == [{"training": MINI.training.model_dump(mode="json")}]
    for cell in MINI.cells:
        ref = Ref("checkpoint", cell.key)
        row = rf"\| `{re.escape(str(ref))}` \| `{landed.landed(ref).data_version}` \|"
        assert re.search(row, parts["Files"])
    assert landed.landed(Ref("base_model")).data_version in parts["Files"]


def test_the_card_of_a_hubs_model_names_it_and_the_licence():
    front, _ = sections({"README.md": card(REAL, "model", {}).encode()})
    assert front["base_model"] == "Qwen/Qwen2.5-7B-Instruct"
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "cc-by-sa-4.0"
    front, parts = sections({"README.md": card(REAL, "dataset", {}).encode()})
    assert front["license"] == "cc-by-sa-4.0"
    assert "base_model" not in front
    assert "scientific claim" not in parts["Limits"]
    assert "superkaiba1/explore-persona-space" in parts["Limits"]
    assert len(blocks(parts["Training"])) == 2  # another recipe than the study's own


def test_the_card_is_made_of_nothing_that_a_second_run_changes(landed, tmp_path):
    again = Store(tmp_path, MINI.name)
    land_everything(Graph(MINI), again)
    for kind in ("dataset", "model"):
        assert content(MINI, again, kind)["README.md"] == content(MINI, landed, kind)["README.md"]
    assert str(landed.root) not in content(MINI, landed, "model")["README.md"].decode()


def test_the_cards_section_imports_every_cell(landed):
    """Another study takes it as it stands, but for the commit."""
    _, parts = sections(content(MINI, landed, "model"))
    (section,) = blocks(parts["Import as carry-over"])
    assert section == {
        "carry_over": {
            "kind": "hub",
            "repo": "owner/adapters",
            "revision": "COMMIT",
            "folder": "{source}.{arm}.{seed}",
            "format": "adapter",
            "training": MINI.training.model_dump(mode="json"),
        }
    }
    section["carry_over"]["revision"] = COMMIT
    raw = MINI.model_dump(mode="json") | {"name": "second"} | section
    raw["arms"]["garbage_cot"]["origin"] = "carry_over"
    second = parse_study(yaml.safe_dump(raw))
    for cell in second.cells_of("carry_over"):
        folder = second.carry_over.folder.format(source=cell.source, arm=cell.arm, seed=cell.seed)
        assert folder == cell.key
        assert f"{folder}/file" in content(MINI, landed, "model")


def test_a_title_is_no_markup(landed):
    title = "title: '<script>x</script> [a](b) --- {c}: |d'"
    study = parse_study(re.sub(r"^title: .*$", title, MINI_TEXT, flags=re.MULTILINE))
    front, _ = sections(content(study, landed, "dataset"))
    assert front["pretty_name"] == study.title
    assert "<script>" not in content(study, landed, "dataset")["README.md"].decode().split("# ")[1]
