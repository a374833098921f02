"""The command line: what it prints, and how it tells of mistakes."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
from click.testing import CliRunner

from persona_assets import environment
from persona_assets.cli import main
from persona_assets.store import Ref, Store
from persona_assets.study import parse_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.test_graph import MINI, land, land_everything

CELL = "librarian.garbage_cot.42"


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """The mini study, landed as far as the store can tell, in a data folder of its own."""
    shutil.copytree(PROJECT / "data" / "studies", tmp_path / "studies")
    for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR, "DAGSTER_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(environment.DAGSTER_STORAGE, str(tmp_path / "dagster"))
    store = Store(tmp_path / "store", "mini")
    land_everything(MINI, store)
    return store


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_why_names_the_changed_input_of_each_stage(store, tmp_path):
    study = tmp_path / "studies" / "mini.yaml"
    text = study.read_text("utf-8").replace("learning_rate: 2.0e-3", "learning_rate: 1.0e-3")
    study.write_text(text, "utf-8")
    assert parse_study(text).training.learning_rate == 1e-3
    done = invoke("status", "--why", CELL)
    assert done.exit_code == 0, done.output
    lines = [line.split(None, 1) for line in done.output.splitlines()]
    lines = lines[: [name for name, _ in lines].index(f"cell_diagnostics[{CELL}]")]
    assert [(name, rest) for name, rest in lines] == [
        ("rationales[librarian.garbage_cot]", "fresh"),
        (f"training_dataset[{CELL}]", "fresh"),
        (f"checkpoint[{CELL}]", "stale"),
        ("recipe.learning_rate", "was 0.002 and is 0.001"),
        (f"cell_outcomes[{CELL}]", "stale"),
        (
            f"checkpoint[{CELL}]",
            "was made from other inputs: recipe.learning_rate was 0.002 and is 0.001",
        ),
    ]


def test_why_takes_an_asset_and_a_partition(store):
    land(MINI, store, Ref("training_dataset", CELL), "other rows")
    for name in ("checkpoint", f"checkpoint[{CELL}]"):
        done = invoke("status", "--why", name)
        assert f"training_dataset[{CELL}] has other content" in done.output
    assert invoke("status", "--why", "report").output.startswith("report  stale")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("status", "--why", "librarian.garbage_cot.43"), f"Did you mean '{CELL}'?"),
        (("status", "--study", "mimi"), "Studies here: length_matched, mini"),
        (("run", "--cells", "plumber.*"), "no cell of study mini matches 'plumber.*'"),
        (("run", "--up-to", "checkpoints"), "Did you mean 'checkpoint'?"),
    ],
)
def test_mistakes_are_told_in_a_sentence(store, arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert message in done.output


def test_a_folder_that_is_not_there_is_told_in_a_sentence(store, monkeypatch):
    monkeypatch.setenv(environment.ARC_DIR, "/nowhere")
    for command in (("status",), ("status", "--why", "question_bank"), ("run",)):
        done = invoke(*command, "--study", "length_matched")
        assert done.exit_code == 1
        assert "PERSONA_ASSETS_ARC_DIR names /nowhere, which is no folder" in done.output


def test_the_interface_starts_on_loopback_with_its_pools_opened(store, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append((path, arguments)))
    done = invoke("ui", "--port", "3999")
    assert done.exit_code == 0, done.output
    processors = environment.processors()
    assert [line.split()[1:3] for line in done.output.splitlines()] == [
        ["gpu", "1"],
        ["cpu_models", str(processors)],
        ["hub", "1"],
        ["warehouse", "1"],
    ]
    ((path, arguments),) = started
    assert path == sys.executable
    assert arguments[3:] == (
        *("dev", "--workspace", str(PROJECT / "workspace.yaml")),
        *("--host", "127.0.0.1", "--port", "3999"),
    )
    assert (tmp_path / "dagster").is_dir()
