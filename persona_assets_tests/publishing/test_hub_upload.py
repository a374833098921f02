"""Uploading to a hub on loopback: one commit or none, and nothing without a token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from persona_assets.hub_client import HubError, HubUnavailable
from persona_assets.publishing.hub_upload import Repository, Uploaded, upload
from persona_assets_tests.hub_server import Fault, Refusal, git_hash, point_client_at
from persona_assets_tests.hub_writes import ATTRIBUTES, INBOX, WritableHub, writable_hub

TOKEN = "hf_canary_5e1f0c9a77"
WEIGHTS, CONFIG, STUDY, CARD = (
    "a.b.1/adapter_model.safetensors",
    "a.b.1/adapter_config.json",
    "study/tiny.yaml",
    "README.md",
)
README = b"---\nlicense: apache-2.0\n---\n\n# Tiny\n"


class Bench:
    """A hub, files to upload to it, and the client pointed at it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch = folder, patch
        self.waits: list[float] = []
        self.files: dict[str, Path | bytes] = {STUDY: b"name: tiny\n", CARD: README}
        self.put(WEIGHTS, bytes(range(256)) * 9)
        self.put(CONFIG, b"{}")

    def put(self, path: str, content: bytes) -> None:
        file = self.folder / path.replace("/", "_")
        file.write_bytes(content)
        self.files[path] = file

    @property
    def content(self) -> dict[str, bytes]:
        return {p: c if isinstance(c, bytes) else c.read_bytes() for p, c in self.files.items()}

    def upload(self, hub: WritableHub | None, *, kind="model", private=True) -> Uploaded:
        """Upload to ``hub``, or to a place where nothing listens."""
        point_client_at(hub.endpoint if hub else "http://127.0.0.1:9", self.patch)
        own = re.compile(r"\w+\.\w+\.\d+/.+")
        return upload(Repository("owner/tiny", kind, private, own), self.files, "Study tiny")

    def refused(self, hub: WritableHub | None, kind: type = HubError, **options) -> str:
        """The error of an upload, whose text tells no token."""
        with pytest.raises(HubError) as error:
            self.upload(hub, **options)
        assert type(error.value) is kind
        assert error.value.__cause__ is None
        assert error.value.__suppress_context__ or error.value.__context__ is None
        assert TOKEN not in str(error.value)
        return str(error.value)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    bench = Bench(tmp_path / "files", monkeypatch)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=bench.waits.append))
    return bench


def hub(
    faults: Mapping[str, Iterable[Fault | Refusal | None]] | None = None,
    ignored: Iterable[str] = (),
):
    return writable_hub(TOKEN, faults, ignored)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_the_files_are_there_in_one_commit_and_no_second_copy_here(bench, tmp_path, kind):
    with hub() as there:
        done = bench.upload(there, kind=kind)
        repository = there.repository("owner/tiny", kind)
        assert repository.private
        assert repository.files == ATTRIBUTES | bench.content
        assert list(repository.commits)[1:] == [done.commit]
        assert done == Uploaded(done.commit, tuple(bench.files), ())
        assert there.steps().count("put") == 1
        assert {r.token for r in there.requests if r.path.startswith(INBOX)} == {None}
        assert {r.token for r in there.requests if not r.path.startswith(INBOX)} == {
            f"Bearer {TOKEN}"
        }
    assert not (tmp_path / "cache").exists()
    assert len(list(bench.folder.iterdir())) == 2


def test_equal_content_makes_no_commit(bench):
    with hub() as there:
        first = bench.upload(there)
        there.requests.clear()
        again = bench.upload(there)
        assert again == Uploaded(first.commit, (), ())
        assert there.steps() == ["create"]
        assert len(there.repository("owner/tiny", "model").commits) == 2


@pytest.mark.parametrize("path", [WEIGHTS, CONFIG, CARD])
def test_one_changed_file_is_a_commit_of_that_file(bench, path):
    """Of the same size as it was: hashes are compared, in large-file storage and beside it."""
    with hub() as there:
        first = bench.upload(there)
        changed = bench.content[path]
        bench.put(path, changed[:-1] + bytes([changed[-1] ^ 1]))
        there.requests.clear()
        second = bench.upload(there)
        repository = there.repository("owner/tiny", "model")
        assert list(repository.commits)[1:] == [first.commit, second.commit]
        assert (second.written, second.removed) == ((path,), ())
        assert repository.files == ATTRIBUTES | bench.content
        assert there.steps().count("put") == (path == WEIGHTS)


def test_a_cell_that_is_gone_goes_and_nothing_of_others(bench):
    with hub() as there:
        bench.put("a.b.2/adapter_config.json", b"{ }")
        bench.upload(there)
        repository = there.repository("owner/tiny", "model")
        by_hand = {"LICENSE": b"terms", "notes/a.b.1.md": b"mine", "a.b/c": b"mine"}
        repository.files.update(by_hand)
        del bench.files["a.b.2/adapter_config.json"]
        done = bench.upload(there)
        assert (done.written, done.removed) == ((), ("a.b.2/adapter_config.json",))
        assert repository.files == ATTRIBUTES | by_hand | bench.content


def test_a_commit_by_hand_is_the_one_that_has_equal_content(bench):
    with hub() as there:
        bench.upload(there)
        repository = there.repository("owner/tiny", "model")
        repository.commits["f" * 40] = repository.files | {"LICENSE": b"terms"}
        assert bench.upload(there) == Uploaded("f" * 40, (), ())


def test_without_a_token_nothing_is_asked(bench):
    bench.patch.delenv("HF_TOKEN")
    with hub() as there:
        assert bench.refused(there) == (
            "model owner/tiny cannot be uploaded to: HF_TOKEN is not set, and nothing was sent. "
            "Set it to a token that may write to it."
        )
        assert there.requests == []


def test_offline_nothing_is_asked(bench):
    bench.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    with hub() as there:
        assert bench.refused(there) == (
            "model owner/tiny cannot be uploaded to: HF_HUB_OFFLINE forbids it. Unset it to "
            "publish."
        )
        assert there.requests == []


def test_a_token_that_may_not_write_is_told_and_not_shown(bench):
    bench.patch.setenv("HF_TOKEN", f"{TOKEN}_of_another")
    with hub() as there:
        message = bench.refused(there)
        assert there.repositories == []
    assert message == (
        "model owner/tiny cannot be uploaded to: the hub refuses access (HTTP 401). Set HF_TOKEN "
        "to a token that may write to it."
    )


def test_an_unreachable_hub_is_unavailable(bench):
    message = bench.refused(None, HubUnavailable)
    assert "model owner/tiny cannot be uploaded to: 127.0.0.1:9 cannot be reached (" in message


@pytest.mark.parametrize(
    ("step", "fault", "kind", "what"),
    [
        ("create", Refusal(503), HubUnavailable, "the hub answered HTTP 503. Try again later."),
        ("batch", Refusal(500), HubUnavailable, "the hub answered HTTP 500"),
        ("put", Refusal(403), HubError, "the hub refuses access (HTTP 403). Set HF_TOKEN"),
        ("verify", Refusal(503), HubUnavailable, "the hub answered HTTP 503"),
        ("commit", Refusal(412), HubUnavailable, "the hub answered HTTP 412"),
        ("commit", Fault.DROP, HubUnavailable, "cannot be reached (RemoteProtocolError"),
    ],
)
def test_what_fails_on_the_way_commits_once_all_the_same(bench, step, fault, kind, what):
    with hub({step: [fault] * 6}) as there:
        assert what in bench.refused(there, kind)
        there.faults = {}
        done = bench.upload(there)
        repository = there.repository("owner/tiny", "model")
        assert list(repository.commits)[1:] == [done.commit]
        assert repository.files == ATTRIBUTES | bench.content
        # A commit whose answer was lost is found, and nothing is sent again.
        assert (done.written == ()) == (fault is Fault.DROP)


def test_another_commit_in_between_is_not_written_over(bench):
    with hub() as there:
        bench.upload(there)
        repository = there.repository("owner/tiny", "model")
        bench.put(CONFIG, b"{ }")
        theirs = repository.files | {CONFIG: b"theirs"}

        def meanwhile():
            repository.commits["1" * 40] = theirs
            yield None

        there.faults = {"preupload": meanwhile()}
        assert "the hub answered HTTP 412" in bench.refused(there, HubUnavailable)
        assert (repository.head, repository.files) == ("1" * 40, theirs)
        assert bench.upload(there).written == (CONFIG,)


def test_a_public_repository_gets_nothing_that_is_to_be_private(bench):
    with hub() as there:
        first = bench.upload(there, private=False)
        repository = there.repository("owner/tiny", "model")
        assert not repository.private
        bench.put(CONFIG, b"{ }")
        assert bench.refused(there, private=True).startswith(
            "model owner/tiny is public on the hub, and publish.hub.private is true: nothing was"
        )
        assert repository.head == first.commit


def test_another_study_is_not_written_over(bench):
    with hub() as there:
        first = bench.upload(there)
        bench.files["study/other.yaml"] = bench.files.pop(STUDY)
        assert bench.refused(there).startswith(
            "model owner/tiny holds another study (study/tiny.yaml): nothing was uploaded."
        )
        assert there.repository("owner/tiny", "model").head == first.commit


def test_a_file_that_the_hub_ignores_is_told(bench):
    with hub(ignored=[WEIGHTS]) as there:
        message = bench.refused(there)
        head = there.repository("owner/tiny", "model").head
    assert message == (
        f"model owner/tiny at {head} lacks {WEIGHTS} as it was sent. Look for a .gitignore in it "
        "that excludes that."
    )


def test_the_hash_of_small_files_is_gits(bench):
    """Git's own, of a known text."""
    assert git_hash(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
