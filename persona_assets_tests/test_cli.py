"""The command line: what it prints, and how it tells of mistakes."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from unicodedata import category

import duckdb
import polars as pl
import pytest
from click.testing import CliRunner

from persona_assets import cli, environment
from persona_assets.cli import main
from persona_assets.reporting import queries
from persona_assets.store import Ref, Store
from persona_assets.study import parse_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.landed import MINI, land
from persona_assets_tests.synthetic import bank, small_study
from persona_assets_tests.synthetic import land as land_rows

CELL = "librarian.garbage_cot.42"


@pytest.fixture
def store(own_mini_store, tmp_path, monkeypatch) -> Store:
    """The mini study, landed as far as the store can tell, in a data folder of its own."""
    shutil.copytree(PROJECT / "data" / "studies", tmp_path / "studies")
    for variable in (environment.ARC_DIR, environment.TOKENIZER_DIR, "DAGSTER_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(environment.DATA, str(tmp_path))
    monkeypatch.setenv(environment.DAGSTER_STORAGE, str(tmp_path / "dagster"))
    return own_mini_store


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_what_cannot_be_served_is_said_before_an_engine_is_started(store, tmp_path, monkeypatch):
    def started(*_):
        raise AssertionError("the engine was started")

    monkeypatch.setattr("persona_assets.evaluation.hosts.local_vllm", started)
    refused = invoke("serve")
    assert refused.exit_code == 1
    assert "evaluation.engine is transformers, whose runs ask no server" in refused.output
    study = tmp_path / "studies" / "mini.yaml"
    study.write_text(
        study.read_text("utf-8").replace("engine: transformers", "engine: vllm_server")
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = invoke("serve", "--port", str(other.getsockname()[1]))
    assert taken.exit_code == 1
    assert "in use" in taken.output
    (store.folder(Ref("base_model")) / "manifest.json").unlink()
    missing = invoke("serve")
    assert missing.exit_code == 1
    assert "run --study mini --up-to base_model" in missing.output


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


def test_verify_reads_everything_and_what_it_names_is_missing_afterwards(store):
    whole = invoke("verify")
    assert whole.exit_code == 0, whole.output
    assert whole.output == f"0 of {len(MINI.refs)} partitions are damaged\n"
    ref = Ref("checkpoint", CELL)
    path = store.directory(ref) / "file"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert "missing" not in invoke("status").output
    found = invoke("verify")
    assert found.exit_code == 1
    assert found.output.startswith(f"{path} has SHA-256 ")
    assert found.output.endswith(f"1 of {len(MINI.refs)} partitions are damaged\n")
    assert f"{ref}" in found.output
    why = invoke("status", "--why", str(ref)).output
    assert f"{path} is missing" in why


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
        ["publish", "1"],
    ]
    ((path, arguments),) = started
    assert path == sys.executable
    assert arguments[3:] == (
        *("dev", "--workspace", str(PROJECT / "workspace.yaml")),
        *("--host", "127.0.0.1", "--port", "3999"),
    )
    assert (tmp_path / "dagster").is_dir()


@pytest.mark.parametrize("name", ["../studies/mini", "/etc/hosts", "mini\0", "..", "", "m" * 70])
def test_a_study_is_named_and_not_a_path(store, name):
    for command in (("status",), ("run",), ("sql", "FROM study"), ("trace", "count/cells")):
        done = invoke(command[0], f"--study={name}", *command[1:])
        assert done.exit_code == 1
        assert "is no study's name" in done.output


@pytest.fixture(scope="module")
def acting(tmp_path_factory):
    """A warehouse of made-up rows, whose rationales act."""
    folder = tmp_path_factory.mktemp("acting")
    landed = land_rows(folder, small_study(), bank(12), rationale=f"{ACTS} (A)")
    landed.build(folder / "made.duckdb")
    return folder / "made.duckdb"


@pytest.fixture
def hostile(store, acting, monkeypatch):
    """The mini study's store, with that warehouse."""
    monkeypatch.setattr(cli, "_warehouse", lambda study: acting)


ACTS = "\x1b[31mred\x1b]0;title\x07\x9b\u202e\u2066\x00\x7f\r"
_SQL = (
    "SELECT rationale FROM outcomes LIMIT 3",
    "SELECT rationale::INT FROM outcomes",
    "SELECT error(rationale) FROM outcomes",
    f'SELECT 1 AS "{ACTS.replace(chr(0), "")}"',
    f"SELECT {ACTS}",
    "PIVOT (SELECT rationale AS r, 1 AS n FROM outcomes LIMIT 2) ON r USING sum(n)",
)


@pytest.mark.parametrize(
    "arguments",
    [
        *(("sql", query) for query in _SQL),
        ("trace", "count/outcomes", "--rows"),
        ("trace", "count/outcomes", "--rows", "--json"),
        ("trace", f"no{ACTS}"),
        ("status", "--why", f"no{ACTS}"),
        ("run", "--cells", f"no{ACTS}"),
        ("status", f"--study=no{ACTS}"),
    ],
)
def test_nothing_printed_acts_on_a_terminal(hostile, arguments):
    done = invoke(*arguments)
    assert done.output.strip()
    assert done.exception is None or isinstance(done.exception, SystemExit)
    for character in done.output:
        assert character in "\n" or character.isprintable() or category(character) == "Zs"


def test_a_row_far_down_that_fails_is_told_in_a_sentence(hostile):
    query = "SELECT (CASE WHEN i = 90 THEN 'x' ELSE '1' END)::INT FROM range(5000000) t(i)"
    done = invoke("sql", query, "--limit", "1000000")
    assert (done.exit_code, done.output.startswith("Error: Conversion Error: ")) == (1, True)


def test_the_variables_of_the_command_are_no_tables(hostile):
    frame = pl.DataFrame({"a": ["secret"]})  # DuckDB would find it by its name
    with queries.open_warehouse(cli._warehouse("mini")) as db:
        with pytest.raises(duckdb.CatalogException, match="frame"):
            db.execute("FROM frame")
        assert db.execute("SELECT current_setting('temp_directory')").fetchone() == ("",)
    assert frame.height == 1
