"""The store: what has landed is whole, what has not is never read."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict

import polars as pl
import pytest

from persona_assets.audit import Distribution, audit
from persona_assets.hashing import sha256_text
from persona_assets.store import Manifest, Provenance, Ref, Store, StoreError, write_atomically

INPUTS = {
    "code_version": "1",
    "settings": {"seed": 186},
    "sources": {},
    "upstream": {"question_bank": "v1"},
}
MADE_BY = Provenance("run-1", INPUTS, "study", {"polars": "2"})


def land(store: Store, ref: Ref, value: int, **more) -> Manifest:
    with store.draft(ref) as draft:
        pl.DataFrame({"value": [value]}).write_parquet(draft / "rows.parquet")
        return store.land(ref, draft, provenance=MADE_BY, **more)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path, "study")


REF = Ref("training_dataset", "librarian.garbage_cot.42")


def test_what_lands_is_read_back(store):
    assert store.manifest(REF) is None
    finding = audit("a", False, observed="2", threshold="1", remedy="less", worst=["row"])
    manifest = land(store, REF, 7, audits=[finding], summary={"rows": 1})
    assert store.frame(REF)["value"].to_list() == [7]
    assert store.manifest(REF) == manifest
    assert manifest.blocking_failures == (finding,)
    assert manifest.provenance == MADE_BY
    assert store.directory(REF).name == manifest.version


def test_equal_content_has_an_equal_version_wherever_it_lands(store):
    first, other = land(store, REF, 7), land(store, Ref("training_dataset", "other"), 7)
    assert first.data_version == other.data_version
    assert land(store, REF, 8).data_version != first.data_version


def test_a_new_version_leaves_the_old_files_to_their_readers(store):
    old = store.folder(REF) / land(store, REF, 7).version
    land(store, REF, 8)
    assert pl.read_parquet(old / "rows.parquet")["value"].to_list() == [7]
    assert store.frame(REF)["value"].to_list() == [8]


def test_landing_the_same_again_heals_damaged_files(store):
    manifest = land(store, REF, 7)
    (store.folder(REF) / manifest.version / "rows.parquet").write_bytes(b"garbage")
    assert land(store, REF, 7).version == manifest.version
    assert store.frame(REF)["value"].to_list() == [7]


def test_a_draft_that_is_not_landed_leaves_nothing(store):
    def fail_after_writing() -> None:
        with store.draft(REF) as draft:
            (draft / "rows.parquet").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_writing()
    assert list(store.folder(REF).iterdir()) == []
    assert store.manifest(REF) is None


TAKE_A_TURN = """
import sys
from pathlib import Path
from persona_assets.store import Store
from persona_assets_tests.test_store import REF, land
store = Store(Path(sys.argv[1]), "study")
with store.turn(REF, on_wait=lambda: print("waits", flush=True)):
    print(store.manifest(REF).summary["value"] if store.manifest(REF) else None, flush=True)
    sys.stdin.read()
"""


def turn_in_another_process(tmp_path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TAKE_A_TURN, str(tmp_path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_one_process_makes_a_partition_and_another_waits_for_what_it_lands(tmp_path, store):
    with store.turn(REF):
        other = turn_in_another_process(tmp_path)
        assert other.stdout.readline() == "waits\n"
        land(store, REF, 7, summary={"value": 7})
    assert other.communicate()[0] == "7\n"


def test_a_killed_processs_turn_is_over_and_what_it_left_is_removed(tmp_path, store):
    other = turn_in_another_process(tmp_path)
    assert other.stdout.readline() == "None\n"
    for debris in (".draft-dead", ".old-version"):
        (store.folder(REF) / debris).mkdir()
        (store.folder(REF) / debris / "weights").write_bytes(b"half")
    (store.folder(REF) / ".manifest.json.dead").write_text("{")
    waited = []

    def on_wait() -> None:
        waited.append(sorted(path.name[:4] for path in store.folder(REF).iterdir()))
        other.kill()

    with store.turn(REF, on_wait):
        assert list(store.folder(REF).iterdir()) == []
        land(store, REF, 7)
    assert waited == [[".dra", ".man", ".old"]]
    assert other.wait() == -signal.SIGKILL
    with store.turn(REF):
        assert store.frame(REF)["value"].to_list() == [7]


FORK_IN_A_TURN = """
import os, sys, time
from pathlib import Path
from persona_assets.store import Store
from persona_assets_tests.test_store import REF
with Store(Path(sys.argv[1]), "study").turn(REF):
    child = os.fork()
    if not child:
        time.sleep(600)
print(child, flush=True)
sys.stdin.read()
"""


def test_a_turn_is_over_though_a_child_of_it_lives_on(tmp_path, store):
    """As an engine's core does, which was forked when it was first asked."""
    command = [sys.executable, "-c", FORK_IN_A_TURN, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        child = int(other.stdout.readline())
        waited = []
        with store.turn(REF, on_wait=lambda: (waited.append(1), os.kill(child, signal.SIGKILL))):
            assert waited == []
        os.kill(child, signal.SIGKILL)
        other.stdin.close()


def test_an_empty_draft_does_not_land(store):
    with store.draft(REF) as draft, pytest.raises(StoreError, match="nothing was written"):
        store.land(REF, draft, provenance=MADE_BY)


@pytest.mark.parametrize(
    "name",
    ["..", ".", "", "../other", "/etc", "a/b", "a\\b", "a\0", "~", " ", "é", "a\n", "a" * 201],
)
def test_a_name_that_leads_out_of_the_store_is_no_partition(store, name):
    for ref in (Ref(name), Ref("training_dataset", name)):
        for use in (store.folder, store.manifest, store.landed, store.frame, store.directory):
            with pytest.raises(StoreError, match="is no partition"):
                use(ref)
        with pytest.raises(StoreError, match="is no partition"), store.draft(ref):
            pass
    assert list(store.root.parent.iterdir()) == []


def test_a_link_does_not_land(store, tmp_path):
    (tmp_path / "secret").write_text("elsewhere")
    with store.draft(REF) as draft:
        (draft / "rows.parquet").symlink_to(tmp_path / "secret")
        with pytest.raises(StoreError, match=r"rows\.parquet is a symbolic link"):
            store.land(REF, draft, provenance=MADE_BY)
    assert store.manifest(REF) is None


def test_a_link_in_a_landed_files_place_is_not_followed(store, tmp_path):
    manifest = land(store, REF, 7)
    path = store.path(REF, "rows.parquet")
    path.rename(tmp_path / "elsewhere")  # of the very same content
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="is no file of its own"):
        store.frame(REF)
    path.unlink()
    assert land(store, REF, 7).version == manifest.version
    assert store.frame(REF)["value"].to_list() == [7]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda m: m["files"].update({"../../../secret": m["files"]["rows.parquet"]}),
            "no part of",
        ),
        (lambda m: m["files"].update({"/secret": m["files"]["rows.parquet"]}), "no part of a path"),
        (lambda m: m.update(version=".."), "no part of a path"),
        (lambda m: m.update(version=7), "expected string"),
        (lambda m: m["ref"].update(key="other"), "it is of training_dataset"),
        (lambda m: m["files"]["rows.parquet"].update(bytes="9"), "no size and hash"),
        (lambda m: m["files"]["rows.parquet"].pop("sha256"), "sha256"),
        (lambda m: m.update(audits=[1]), "has no attribute"),
        (lambda m: m["provenance"].update(inputs=[]), "no inputs"),
    ],
)
def test_a_manifest_of_other_files_is_damaged(store, tmp_path, change, says):
    land(store, REF, 7)
    path = store.folder(REF) / "manifest.json"
    (tmp_path / "study" / "secret").write_text("elsewhere")
    raw = json.loads(path.read_text())
    del raw["sha256"]  # as an earlier release wrote them, whose hash does not tell
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(StoreError, match="is damaged") as error:
        store.directory(REF)
    assert says in str(error.value)
    assert (tmp_path / "study" / "secret").read_text() == "elsewhere"


def test_a_manifest_is_read_as_it_was_written_or_not_at_all(store):
    """Each digit and letter of it exchanged for another, one at a time; most are JSON still."""
    manifest = land(store, REF, 7, summary={"accuracy": 0.25, "seconds": 1e-3})
    path = store.folder(REF) / "manifest.json"
    written = path.read_text("utf-8")
    parsed = 0
    for at, character in enumerate(written):
        if not character.isalnum():
            continue
        changed = f"{written[:at]}{'7' if character != '7' else '8'}{written[at + 1 :]}"
        path.write_text(changed, "utf-8")
        with suppress(ValueError):
            parsed += bool(json.loads(changed))
        with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
            store.manifest(REF)
    assert parsed > 300
    path.write_text(json.dumps(json.loads(written)), "utf-8")  # other spaces say nothing else
    assert store.manifest(REF) == manifest
    assert land(store, REF, 7).data_version == manifest.data_version
    assert store.landed(REF).summary == {}


def test_a_manifest_of_an_earlier_release_is_read(store):
    manifest = land(store, REF, 7)
    path = store.folder(REF) / "manifest.json"
    raw = json.loads(path.read_text("utf-8"))
    assert len(raw.pop("sha256")) == 64
    path.write_text(json.dumps(raw), "utf-8")
    assert store.manifest(REF) == manifest


def test_a_manifest_of_endless_nesting_is_damaged(store):
    land(store, REF, 7)
    (store.folder(REF) / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(StoreError, match="is damaged"):
        store.manifest(REF)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_files_are_named_not_used(store, damage):
    manifest = land(store, REF, 7)
    path = store.folder(REF) / manifest.version / "rows.parquet"
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content[:-1] if damage == "truncate" else content))
    with pytest.raises(StoreError, match=r"rows\.parquet.*aterialize training_dataset\[libr"):
        store.frame(REF)
    with pytest.raises(StoreError, match=r"rows\.parquet"):
        store.directory(REF)
    # A re-run sees it, and makes the partition again.
    assert "rows.parquet" in store.damage(store.landed(REF))
    assert land(store, REF, 7).version == manifest.version
    assert store.frame(REF)["value"].to_list() == [7]


def test_a_file_whose_times_were_set_back_is_looked_at_again(store):
    """As after a clock that moved backwards, or a copy that keeps times."""
    manifest = land(store, REF, 7)
    path = store.path(REF, "rows.parquet")
    before, content = path.stat(), bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(StoreError, match="has SHA-256"):
        store.frame(REF)
    assert [p.name[:9] for p in (store.folder(REF) / manifest.version).iterdir()] == [".damaged-"]


@pytest.mark.parametrize("mended", [False, True])
def test_what_another_process_has_set_aside_or_mended_is_left_alone(store, monkeypatch, mended):
    manifest = land(store, REF, 7)
    path = store.folder(REF) / manifest.version / "rows.parquet"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")

    def meanwhile(*_) -> str:  # after this process has read the damaged file
        path.unlink()
        if mended:
            path.write_bytes(good)
        return "0" * 64

    monkeypatch.setattr("persona_assets.store._hash_once", meanwhile)
    says = "has mended it since" if mended else "has set it aside"
    with path.open(), pytest.raises(StoreError, match=f"Another process {says}"):
        store.frame(REF)
    left = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    assert left == ({"rows.parquet": good} if mended else {})


def test_a_damaged_file_that_cannot_be_set_aside_is_named(store, monkeypatch):
    manifest = land(store, REF, 7)
    path = store.folder(REF) / manifest.version / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        StoreError, match=r"rows\.parquet has SHA.*Read-only file system.*delete it"
    ):
        store.frame(REF)
    monkeypatch.setattr("persona_assets.store.sha256_file", refuse)
    path.touch()
    with pytest.raises(StoreError, match=r"rows\.parquet cannot be read .*aterialize training_da"):
        store.frame(REF)


LAND_AT_ONCE = """
import sys, time
from pathlib import Path
from persona_assets.store import Ref, Store
from persona_assets_tests.test_store import REF, land
store = Store(Path(sys.argv[1]), "study")
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
for value in range(300):
    land(store, REF, value)
"""


def test_two_processes_that_land_the_same_both_succeed(tmp_path, store):
    start = str(time.time() + 3)
    both = [
        subprocess.Popen([sys.executable, "-c", LAND_AT_ONCE, str(tmp_path), start])
        for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert store.frame(REF)["value"].to_list() == [299]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"ref": 1}', "null"])
def test_a_damaged_manifest_is_named(store, text):
    land(store, REF, 7)
    (store.folder(REF) / "manifest.json").write_text(text, "utf-8")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        store.manifest(REF)


def test_what_has_not_landed_is_named(store):
    with pytest.raises(StoreError, match=r"training_dataset\[librarian.*has not landed"):
        store.landed(REF)


def test_an_unwritable_store_names_the_path(tmp_path):
    (tmp_path / "study").write_text("a file where a folder should be")
    with (
        pytest.raises(StoreError, match=r"cannot be made: .*study/training_dataset"),
        Store(tmp_path, "study").draft(REF),
    ):
        pass


def test_atomic_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "one")
    write_atomically(path, "two")
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


LANDING_LOOP = """
import sys
from pathlib import Path
from persona_assets.store import Ref, Store
from persona_assets_tests.test_store import REF, land
store = Store(Path(sys.argv[1]), "study")
for value in range(100_000):
    land(store, REF, value)
    print(value, flush=True)
"""


def test_killed_while_landing_the_store_stays_whole(tmp_path, store):
    """SIGKILL at ten moments of a process that lands one version after another."""
    values = []
    for moment in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", LANDING_LOOP, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert process.stdout.readline()
        time.sleep(0.013 * moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (value,) = store.frame(REF)["value"].to_list()
        values.append(value)
    assert len(set(values)) > 1, "every kill hit the same version: the loop did not run"
    assert land(store, REF, -1).data_version == store.landed(REF).data_version


def test_findings_are_hashed_over_all_fields_of_the_audits(tmp_path):
    """The hash stands in ledgers that have landed: another way to it must lead to the same."""
    spread = Distribution(
        "rows", "tokens", "rows", [0.0, 1.0, 2.0], {"rows": [3, 4]}, [1.5], "each"
    )
    audits = [
        audit("spread", True, observed="1", threshold="2", remedy="None.", details={"b": (1, 2)}),
        audit("drawn", False, observed="3", threshold="4", remedy="None.", distribution=spread),
    ]
    with (store := Store(tmp_path, "s")).draft(REF) as draft:
        (draft / "a.txt").write_text("a")
        provenance = Provenance("run", {"upstream": {}, "code_version": "1"}, "0" * 64)
        landed = store.land(REF, draft, provenance=provenance, audits=audits)
    written = json.dumps([asdict(audit) for audit in audits], sort_keys=True)
    assert landed.findings == store.landed(REF).findings == sha256_text(written)
