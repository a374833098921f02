"""The store on object storage: what lands on one machine is read on another, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import ObjectStore, StoreUnavailable, open_store
from persona_assets.store import Manifest, Ref, Store, StoreError, StoreUnreachable
from persona_assets_tests.object_storage import (
    BUCKET,
    URL,
    ObjectStorage,
    forget_servers,
    object_storage,
)
from persona_assets_tests.test_store import REF, land

FOLDER = "study/training_dataset/librarian.garbage_cot.42"


@pytest.fixture(scope="module")
def server():
    with object_storage() as storage:
        yield storage


@pytest.fixture
def storage(server, monkeypatch) -> Iterator[ObjectStorage]:
    """The server, empty, and this process's way to it."""
    for key in server.objects():
        server.delete(key)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    forget_servers()
    yield server
    forget_servers()


@pytest.fixture
def here(storage, tmp_path) -> ObjectStore:
    return ObjectStore(URL, tmp_path / "here", "study")


@pytest.fixture
def there(storage, tmp_path) -> ObjectStore:
    """The same store, as another machine sees it."""
    return ObjectStore(URL, tmp_path / "there", "study")


def test_what_lands_here_is_read_there(storage, here, there):
    assert there.manifest(REF) is None
    manifest = land(here, REF, 7)
    assert there.manifest(REF) == manifest
    assert there.frame(REF)["value"].to_list() == [7]
    assert storage.objects() == [
        f"{FOLDER}/{manifest.version}/rows.parquet",
        f"{FOLDER}/manifest.json",
    ]
    assert there.address(manifest) == f"{URL}/{FOLDER}/{manifest.version}"
    land(there, REF, 8)
    assert here.frame(REF)["value"].to_list() == [8]


def test_processes_that_want_the_same_file_download_it_once(here, there, monkeypatch):
    """And what a killed download has left of the version is removed."""
    manifest = land(here, REF, 7)
    left = there.files_at(manifest) / ".arriving-another.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    downloads, chunks = [], ObjectStore._chunks

    def slow(self, manifest, name):
        downloads.append(name)
        time.sleep(0.5)
        yield from chunks(self, manifest, name)

    monkeypatch.setattr(ObjectStore, "_chunks", slow)
    others = [ObjectStore(URL, there.root.parent, "study") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        frames = list(pool.map(lambda store: store.frame(REF), others))
    assert [frame["value"].to_list() for frame in frames] == [[7]] * 4
    assert downloads == ["rows.parquet"]
    assert [path.name for path in left.parent.iterdir()] == ["rows.parquet"]


def test_what_is_here_is_not_downloaded_again(storage, here, there):
    manifest = land(here, REF, 7)
    there.path(REF, "rows.parquet")
    storage.delete(f"{FOLDER}/{manifest.version}/rows.parquet")
    assert there.frame(REF)["value"].to_list() == [7]
    assert "rows.parquet is missing" in there.damage(manifest)


def test_a_damaged_copy_is_downloaded_again(here, there):
    manifest = land(here, REF, 7)
    copy = there.path(REF, "rows.parquet")
    copy.write_bytes(copy.read_bytes()[:-1] + b"?")
    assert there.frame(REF)["value"].to_list() == [7]
    assert there.files_at(manifest) == copy.parent


def test_a_damaged_object_is_named_set_aside_and_healed(storage, here, there):
    manifest = land(here, REF, 7)
    key = f"{FOLDER}/{manifest.version}/rows.parquet"
    whole = storage.read(key)
    storage.write(key, whole[:-1] + b"?")
    assert there.damage(manifest) == ""  # sizes tell nothing
    with pytest.raises(StoreError, match=r"s3://.*rows.parquet has SHA-256 .* was set aside"):
        there.frame(REF)
    assert "rows.parquet is missing" in there.damage(manifest)
    land(there, REF, 7)
    assert storage.read(key) == whole
    assert here.verify(REF) == ""


def test_verify_reads_the_objects_not_the_copies(storage, here):
    manifest = land(here, REF, 7)
    key = f"{FOLDER}/{manifest.version}/rows.parquet"
    storage.write(key, storage.read(key)[:-1] + b"?")
    assert "rows.parquet has SHA-256" in here.verify(REF)


def test_a_cut_off_object_counts_as_damaged(storage, here, there):
    manifest = land(here, REF, 7)
    storage.write(f"{FOLDER}/{manifest.version}/rows.parquet", b"PAR1")
    assert f"has 4 bytes, its manifest says {manifest.files['rows.parquet']['bytes']}" in (
        there.damage(manifest)
    )


def test_a_damaged_manifest_is_named_by_its_url(storage, here, there):
    land(here, REF, 7)
    storage.write(f"{FOLDER}/manifest.json", b"{")
    with pytest.raises(StoreError, match=rf"{URL}/{FOLDER}/manifest.json is damaged"):
        there.manifest(REF)


_KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from persona_assets.object_store import ObjectStore
from persona_assets_tests.object_storage import URL
from persona_assets_tests.test_store import REF, land
store = ObjectStore(URL, Path(sys.argv[1]), "study")
store._put_manifest = lambda manifest: os.kill(os.getpid(), signal.SIGKILL)
with store.turn(REF):
    land(store, REF, 7)
"""


def test_a_process_killed_before_the_manifest_has_landed_nothing_and_lost_nothing(
    storage, here, there
):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(here.root.parent)], env=os.environ, check=False
    )
    assert done.returncode == -9
    assert [Path(key).name for key in storage.objects()] == ["rows.parquet"]
    assert there.manifest(REF) is None
    with here.turn(REF):  # whoever is next at it on that machine
        assert here.frame(REF)["value"].to_list() == [7]
    assert there.frame(REF)["value"].to_list() == [7]


def test_what_could_not_be_uploaded_gives_way_to_what_landed_later(here, there):
    path = pending(here, 7)
    while Manifest.from_json(path.read_text()).landed_at == now():
        time.sleep(0.05)
    land(there, REF, 8)
    with here.turn(REF):
        assert here.frame(REF)["value"].to_list() == [8]
    assert not path.exists()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def test_released_files_are_gone_everywhere_but_their_manifest(storage, here, there):
    land(here, REF, 7)
    there.release(REF)
    assert storage.objects() == [f"{FOLDER}/manifest.json"]
    assert here.landed(REF).released
    with pytest.raises(StoreError, match="were removed after use"):
        here.frame(REF)


def test_a_missing_bucket_is_told_before_any_work(storage, tmp_path):
    store = ObjectStore("s3://no-such-bucket/x", tmp_path, "study")
    for ask in (
        store.require_writable,
        lambda: store.manifest(REF),
        store.survey,
        lambda: land(store, REF, 7),
    ):
        with pytest.raises(StoreUnreachable, match=r"s3://no-such-bucket/x.* no such bucket"):
            ask()
    assert (store.folder(REF) / "manifest.pending.json").exists()


def test_a_store_that_can_be_written_keeps_no_probe(storage, here):
    here.require_writable()
    assert storage.objects() == []


def test_no_answer_is_told_with_the_url_and_may_pass(storage, tmp_path, monkeypatch, mini):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget_servers()
    store = ObjectStore(f"s3://{BUCKET}/elsewhere", tmp_path, "study")
    with pytest.raises(StoreUnavailable, match=r"manifest.json cannot be read: .*127.0.0.1:9"):
        store.manifest(REF)
    with pytest.raises(StoreUnavailable):  # nothing counts as missing, and is made again
        Freshness(Graph(mini), store).state(Ref("question_bank"))
    with pytest.raises(StoreUnavailable):
        Freshness(Graph(mini), store).read_ahead()


def test_no_password_in_the_url(tmp_path):
    with pytest.raises(StoreError, match="holds a user or password") as error:
        ObjectStore("s3://key:secret@bucket/x", tmp_path, "study")
    assert "secret" not in str(error.value)


def test_one_file_system_on_another_is_refused(tmp_path):
    with pytest.raises(StoreError, match="puts one file system on another"):
        ObjectStore("simplecache::s3://bucket/x", tmp_path, "study")


def pending(store: ObjectStore, value: int) -> Path:
    """Land a value that cannot be uploaded; what is left of it."""

    def unreachable(manifest) -> None:
        raise StoreUnavailable("no answer")

    store._put_manifest = unreachable
    with pytest.raises(StoreUnavailable):
        land(store, REF, value)
    del store._put_manifest
    return store.folder(REF) / "manifest.pending.json"


def test_what_was_uploaded_and_released_since_is_not_uploaded_again(storage, here, there):
    path = pending(here, 7)
    text = path.read_text()
    with here.turn(REF):
        pass
    there.release(REF)
    path.write_text(text)  # as if killed before it could be removed
    with here.turn(REF):
        pass
    assert storage.objects() == [f"{FOLDER}/manifest.json"]
    assert there.landed(REF).released


def test_what_is_pending_replaces_a_damaged_manifest(storage, here, there):
    land(there, REF, 8)
    pending(here, 7)
    storage.write(f"{FOLDER}/manifest.json", b"{")
    with here.turn(REF):
        assert there.frame(REF)["value"].to_list() == [7]


def test_what_is_pending_and_damaged_is_given_up(storage, here):
    path = pending(here, 7)
    (table,) = here.folder(REF).glob("*/rows.parquet")
    table.write_bytes(table.read_bytes()[:-1] + b"?")
    with here.turn(REF):
        assert here.manifest(REF) is None
    assert not path.exists()


def test_what_lands_after_a_listing_is_not_called_damaged(here, there):
    land(here, REF, 7)
    survey = there.survey()
    manifest = land(here, REF, 8)
    assert survey.manifest(REF) == manifest
    assert survey.damage(manifest) == ""


def test_an_unknown_protocol_is_named(tmp_path):
    with pytest.raises(StoreError, match="PERSONA_ASSETS_STORE: nosuch://x"):
        ObjectStore("nosuch://x", tmp_path, "study").manifest(REF)


def test_where_the_store_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PERSONA_ASSETS_DATA", str(tmp_path))
    monkeypatch.delenv("PERSONA_ASSETS_STORE", raising=False)
    assert open_store("study").root == tmp_path / "store" / "study"
    monkeypatch.setenv("PERSONA_ASSETS_STORE", str(tmp_path / "elsewhere"))
    assert type(open_store("study")) is Store
    assert open_store("study").root == tmp_path / "elsewhere" / "study"
    monkeypatch.setenv("PERSONA_ASSETS_STORE", "memory://bucket")
    store = open_store("study")
    assert isinstance(store, ObjectStore)
    assert store.root.parents[1] == tmp_path / "mirror"


def test_a_whole_study_is_looked_at_in_one_go(here, there, mini):
    graph = Graph(mini)
    refs = [ref for ref in graph.refs if ref.asset == "training_dataset"]
    for ref in refs[:3]:
        land(here, ref, 1)
    freshness = Freshness(graph, there).read_ahead()
    landed = [ref for ref in graph.refs if freshness.manifest(ref)]
    assert landed == refs[:3]
    assert freshness.manifest(refs[0]) == here.manifest(refs[0])
    assert not freshness.ever_landed(Ref("report"))


def test_any_file_system_of_fsspecs_will_do(tmp_path):
    one, other = (ObjectStore("memory://shared", tmp_path / n, "study") for n in ("one", "other"))
    land(one, REF, 7)
    assert other.frame(REF)["value"].to_list() == [7]
    assert pl.read_parquet(other.path(REF, "rows.parquet"))["value"].to_list() == [7]
