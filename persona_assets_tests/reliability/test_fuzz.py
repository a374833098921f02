"""A seeded sample of the fuzzing, and that it notices what it looks for."""

from __future__ import annotations

import random
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from persona_assets.store import Store
from persona_assets_tests.reliability import fuzz as fuzzing
from persona_assets_tests.reliability import inputs
from persona_assets_tests.reliability.fuzz import Tally, fuzz
from persona_assets_tests.reliability.readers import READERS, Escape, Reader

SAMPLE = {"study files": 150, "ARC Parquet": 250, "SQL": 150, "number ids": 10, "adapters": 60}


@pytest.mark.parametrize("name", READERS)
def test_bad_input_is_refused_as_documented(name):
    tally = fuzz(name, SAMPLE.get(name, 400), seed=7)
    assert tally.faults == []
    assert tally.tried == SAMPLE.get(name, 400)
    assert tally.refused > tally.tried // 20


def test_readers_are_given_a_million_inputs():
    assert sum(reader.share for reader in READERS.values()) >= 1_000_000


@pytest.mark.parametrize("fault", ["error", "hang", "escape", "late"])
def test_faults_are_counted(monkeypatch, fault):
    @contextmanager
    def opened(folder: Path):
        def use(rng: random.Random) -> bool:
            if fault == "hang" and not folder.joinpath("once").exists():
                folder.joinpath("once").touch()
                time.sleep(60)
            if fault == "error":
                raise KeyError("undocumented")
            if fault == "escape":
                raise Escape("out")
            return True

        yield use
        if fault == "late":
            raise Escape("written")

    monkeypatch.setattr(fuzzing, "SECONDS", 0.2)
    monkeypatch.setitem(READERS, "broken", Reader("broken", opened, 0))
    tally = fuzz("broken", 3, seed=1)
    taken, faults, says = {
        "error": (0, 3, "seed 1, input 0: KeyError: 'undocumented'"),
        "hang": (2, 1, "seed 1, input 0: Hang: longer than 0.2 s"),
        "escape": (0, 3, "seed 1, input 0: Escape: out"),
        "late": (3, 1, "written"),
    }[fault]
    assert (tally.taken, tally.n_faults, tally.faults[0]) == (taken, faults, says)


def test_a_path_that_leaves_the_store_is_noticed(monkeypatch):
    def folder(store: Store, ref) -> Path:
        return store.root / ref.asset.replace("\0", "") / (ref.key or "").replace("\0", "")

    monkeypatch.setattr(Store, "folder", folder)
    tally = fuzz("names", 300, seed=7)
    assert any("Escape" in fault or "Error" in fault for fault in tally.faults)


def test_a_file_read_or_written_through_sql_is_noticed(monkeypatch):
    import duckdb

    from persona_assets.reporting import queries

    def query(rng: random.Random, secret: str, target: str) -> str:
        harm = (f"SELECT * FROM read_text('{secret}')", f"COPY numbers TO '{target}' (FORMAT csv)")
        return rng.choice(harm)

    assert fuzz("SQL", 20, seed=7).faults == []
    monkeypatch.setattr(inputs, "sql", query)
    assert fuzz("SQL", 20, seed=7).taken == 0
    monkeypatch.setattr(queries, "open_warehouse", lambda path: duckdb.connect(str(path)))
    found = " ".join(fuzz("SQL", 20, seed=7).faults)
    assert "read through SQL" in found
    assert "written through SQL" in " ".join(fuzz("SQL", 1, seed=2).faults) + found


def test_inputs_are_those_of_the_seed():
    def made(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [inputs.damaged("a: 1\nb: 2", rng) for _ in range(50)] + [inputs.sql(rng, "s", "t")]

    assert made(1) == made(1) != made(2)
    assert len(set(inputs.NASTY)) == len(inputs.NASTY)


def test_tallies_add_up():
    tally = Tally(1, 2, 3, 0.5, list("abc"))
    tally.add(Tally(1, 1, 3, 0.25, list("def")))
    assert tally == Tally(2, 3, 6, 0.5, list("abcde"))
    assert tally.tried == 11


def test_a_row_a_reader_counts_all_that_was_tried(tmp_path, monkeypatch):
    few = {name: READERS[name] for name in ("names", "number ids")}
    monkeypatch.setattr(fuzzing, "READERS", few)
    named, numbered = fuzzing.rows(tmp_path, seed=7, n=40)
    shares = [reader.share for reader in few.values()]
    assert [named.tried, numbered.tried] == [-(-40 * s // sum(shares)) for s in shares]
    assert (named.lost, numbered.lost) == (0, 0)
    assert named.fault == f"bad input: {few['names'].what}"
    monkeypatch.setattr(fuzzing, "_in_a_process", lambda job: Tally(3, 2, 1, 0.5, ["died"]))
    assert fuzzing.rows(tmp_path, seed=7, n=40)[1].faults == ["died"]
    assert fuzzing.rows(tmp_path, seed=7, n=40)[1].lost == 1
