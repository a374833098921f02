"""``length_matched``'s question bank from the hub's dataset, through Dagster, on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from types import SimpleNamespace

import dagster as dg
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from persona_assets import environment
from persona_assets.assets import base
from persona_assets.definitions import study_definitions
from persona_assets.questions.bank import content_hash, from_frame
from persona_assets.store import Ref, Store
from persona_assets_tests.hub_server import Refusal, Request, hub_server, point_client_at
from persona_assets_tests.questions.published import as_jsonl, as_parquet, published

BANK = Ref("question_bank")
TRAIN, TEST = (f"ARC-Challenge/{split}-00000-of-00001.parquet" for split in ("train", "test"))
TRAIN_ROWS = [
    published("Mercury_1", "What melts ice?", ["heat", "cold", "dark", "wind"], "A"),
    published("NYSED_1", "What do plants need?", ["light", "glass", "sound", "sand"], "1", "12345"),
    published("Mercury_2", "Which is a star?", ["Mars", "the Sun", "the Moon"], "B"),
]
TEST_ROWS = [
    published("NYSED_2", "Which is a metal?", ["wood", "clay", "wool", "iron"], "4", "12345"),
    published("MCAS_1", "Which flies?", ["a cow", "a cat", "a crow", "a fox", "a dog"], "C"),
    published("Mercury_3", " what melts  ICE?", ["rain", "shade", "salt"], "C"),
]
#: As the repository is laid out: other splits and the easy set beside what is wanted.
DECOYS = {
    f"{part}/{split}-00000-of-00001.parquet": as_parquet(
        [published(f"decoy-{part}-{split}", "Which is wrong?", "ab")]
    )
    for part in ("ARC-Easy", "ARC-Challenge")
    for split in ("train", "validation", "test")
}


def dataset(**splits: Iterable[dict]) -> dict[str, bytes]:
    """The repository's files with these rows of ARC-Challenge."""
    paths = {"train": TRAIN, "test": TEST}
    return DECOYS | {paths[split]: as_parquet(rows) for split, rows in splits.items()}


@dataclass
class Bench:
    """``length_matched`` with an empty data folder and an empty hub cache."""

    definitions: dg.Definitions
    store: Store
    repo: str
    revision: str
    patch: pytest.MonkeyPatch
    waits: list[float] = field(default_factory=list)

    @contextmanager
    def hub(self, files: Mapping[str, bytes], **options) -> Iterator[list[Request]]:
        """A hub with ``files`` at the study's commit; yields the requests it gets."""
        requests: list[Request] = []
        pinned = {"repo_type": "dataset", "revision": self.revision, "requests": requests}
        with hub_server(self.repo, files, **pinned | options) as endpoint:
            point_client_at(endpoint, self.patch)
            yield requests

    def make(self, force: bool = False) -> dg.ExecuteInProcessResult:
        """The ``inputs`` job, ``question_bank`` alone."""
        config = {"ops": {"length_matched__question_bank": {"config": {"force": force}}}}
        with dg.DagsterInstance.ephemeral() as instance:
            return self.definitions.resolve_job_def("inputs").execute_in_process(
                instance=instance,
                asset_selection=[dg.AssetKey(["length_matched", "question_bank"])],
                raise_on_error=False,
                run_config=config | {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
            )

    def failure(self) -> str:
        """What the asset raises; nothing may have landed, and nothing lies below the error."""
        done = self.make()
        assert not done.success
        assert self.store.manifest(BANK) is None
        (event,) = [event for event in done.all_events if event.is_step_failure]
        error = event.event_specific_data.error.cause
        assert error.cause is None
        assert error.context is None
        return error.message.strip()


@pytest.fixture
def bench(length_matched, tmp_path, monkeypatch) -> Bench:
    monkeypatch.setenv(environment.DATA, str(tmp_path / "data"))
    monkeypatch.delenv(environment.ARC_DIR, raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    settings = length_matched.questions
    bench = Bench(
        study_definitions(length_matched),
        Store(tmp_path / "data" / "store", "length_matched"),
        settings.repo,
        settings.revision,
        monkeypatch,
    )
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=bench.waits.append))
    monkeypatch.setattr(base, "RETRY_WAITS", ())
    return bench


def test_the_bank_comes_from_the_pinned_commit(bench):
    files = dataset(train=TRAIN_ROWS, test=TEST_ROWS)
    with bench.hub(files) as requests:
        assert bench.make().success
    questions = from_frame(bench.store.frame(BANK))
    assert [(q.split, q.id, len(q.choices), q.correct) for q in questions] == [
        ("train", "Mercury_1", 4, "A"),
        ("train", "NYSED_1", 4, "A"),
        ("train", "Mercury_2", 3, "B"),
        ("eval", "NYSED_2", 4, "D"),
        ("eval", "MCAS_1", 5, "C"),
        ("eval", "Mercury_3", 3, "C"),
    ]
    assert questions[3].published_labels == tuple("1234")
    manifest = bench.store.landed(BANK)
    summary = {k: v for k, v in manifest.summary.items() if k != "seconds"}
    assert summary == {
        "source": f"dataset {bench.repo} at {bench.revision}",
        "files": {name: sha256(files[name]).hexdigest() for name in (TRAIN, TEST)},
        "train_questions": 3,
        "eval_questions": 3,
        "question_bank_sha256": content_hash(questions),
    }
    audits = {audit.name: audit for audit in manifest.audits}
    assert audits["train_eval_identities"].status == "passed"
    assert audits["train_eval_stems"].status == "failed"
    assert audits["train_eval_stems"].details["question_ids"] == ["Mercury_1", "Mercury_3"]
    downloaded = {
        request.path.split("/resolve/")[1] for request in requests if "/re" in request.path
    }
    assert downloaded == {f"{bench.revision}/{name}" for name in (TRAIN, TEST)}


def test_several_shards_are_read_in_order(bench):
    shards = {
        f"ARC-Challenge/train-{i:05}-of-00003.parquet": as_parquet([row])
        for i, row in reversed([*enumerate(TRAIN_ROWS)])
    }
    files = {**dataset(test=TEST_ROWS), **shards}
    del files[TRAIN]
    with bench.hub(files):
        assert bench.make().success
    ids = [q.id for q in from_frame(bench.store.frame(BANK)) if q.split == "train"]
    assert ids == [row["id"] for row in TRAIN_ROWS]
    assert set(bench.store.landed(BANK).summary["files"]) == {*shards, TEST}


def test_a_question_in_both_splits_fails_the_check(bench):
    shared = TRAIN_ROWS[0] | {"id": "Mercury_9", "answerKey": "D"}
    shared["choices"] = {"text": ["wind", "dark", "cold", "heat"], "label": list("ABCD")}
    with bench.hub(dataset(train=TRAIN_ROWS, test=[*TEST_ROWS, shared])):
        done = bench.make()
    (check,) = [
        c for c in done.get_asset_check_evaluations() if c.check_name == "train_eval_identities"
    ]
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    (failed,) = bench.store.landed(BANK).blocking_failures
    assert failed.name == "train_eval_identities"
    assert failed.details["question_ids"] == ["Mercury_1", "Mercury_9"]


def test_a_row_that_is_not_as_published_lands_nothing(bench):
    with bench.hub(
        dataset(train=[*TRAIN_ROWS, TRAIN_ROWS[0] | {"answerKey": "E"}], test=TEST_ROWS)
    ):
        message = bench.failure()
    assert message == (
        f"persona_assets.questions.arc.ArcError: dataset {bench.repo} at {bench.revision}: "
        f"{TRAIN}:4: answerKey: 'E' is not among the labels ['A', 'B', 'C', 'D']. Use one of them."
    )


def test_a_missing_split_lands_nothing(bench):
    files = dataset(train=TRAIN_ROWS)
    del files[TEST]
    with bench.hub(files):
        message = bench.failure()
    assert message.endswith(
        f"dataset {bench.repo} at {bench.revision} has no file matching "
        "ARC-Challenge/test-*.parquet. Pin a commit that has."
    )


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"revision": "f" * 40}, "the repository has no such commit. Pin"),
        ({"repo_type": "model"}, "the hub shows no such dataset repository (HTTP 404). Check"),
        ({"refuse": Refusal(403, "GatedRepo")}, "the hub refuses access (HTTP 403). Accept"),
    ],
)
def test_what_the_hub_refuses_is_asked_once(bench, options, what):
    with bench.hub(dataset(train=TRAIN_ROWS, test=TEST_ROWS), **options) as requests:
        message = bench.failure()
    where = f"dataset {bench.repo} at {bench.revision}"
    assert f"HubError: {where} cannot be fetched: {what}" in message
    assert len(requests) == 1
    assert bench.waits == []


def test_an_unreachable_hub_is_given_up_in_half_a_minute(bench):
    point_client_at("http://127.0.0.1:9", bench.patch)
    message = bench.failure()
    assert "cannot be fetched: 127.0.0.1:9 cannot be reached (ConnectError: " in message
    assert len(bench.waits) == 5
    assert sum(bench.waits) < 30


def test_an_unreachable_hub_is_tried_again_by_the_asset(bench, monkeypatch):
    """After the client has given it up; then it is there."""
    monkeypatch.setattr(base, "RETRY_WAITS", (0.1, 0.1))
    with bench.hub(dataset(train=TRAIN_ROWS, test=TEST_ROWS)):
        endpoint = constants.ENDPOINT
        point_client_at("http://127.0.0.1:9", monkeypatch)

        def wait(seconds: float) -> None:
            bench.waits.append(seconds)
            if len(bench.waits) == 5:  # the client's last before it gives up
                point_client_at(endpoint, monkeypatch)

        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=wait))
        done = bench.make()
    assert done.success
    retries = [e for e in done.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]
    assert len(retries) == 1
    assert len(bench.waits) == 5
    assert bench.store.landed(BANK).data_version


def test_the_cache_serves_offline(bench, monkeypatch):
    with bench.hub(dataset(train=TRAIN_ROWS, test=TEST_ROWS)):
        assert bench.make().success
    version = bench.store.landed(BANK).data_version
    run_id = bench.store.landed(BANK).provenance.run_id
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert bench.make(force=True).success
    again = bench.store.landed(BANK)
    assert again.provenance.run_id != run_id
    assert again.data_version == version


@pytest.fixture(params=["invented", "published"])
def jsonl(request) -> dict[str, bytes]:
    """The local files by name: invented rows, and the published ones where they are at hand."""
    if request.param == "invented":
        return dict(zip(environment.ARC_FILES, map(as_jsonl, (TRAIN_ROWS, TEST_ROWS))))
    folder = request.getfixturevalue("arc_dir")
    return {name: (folder / name).read_bytes() for name in environment.ARC_FILES}


def test_the_hub_and_a_local_folder_give_the_same_bank(jsonl, bench, tmp_path):
    """Byte for byte: changing from one to the other stales nothing that is made from it."""
    folder = tmp_path / "arc"
    folder.mkdir()
    for name, content in jsonl.items():
        (folder / name).write_bytes(content)
    bench.patch.setenv(environment.ARC_DIR, str(folder))
    assert bench.make().success
    local = bench.store.landed(BANK)
    assert local.summary["source"] == f"local folder named by {environment.ARC_DIR}"
    assert local.summary["files"] == {n: sha256(c).hexdigest() for n, c in jsonl.items()}

    bench.patch.delenv(environment.ARC_DIR)
    train, test = ([json.loads(line) for line in jsonl[n].splitlines()] for n in jsonl)
    with bench.hub(dataset(train=train, test=test)):
        assert bench.make().success
    fetched = bench.store.landed(BANK)
    assert fetched.summary["source"] == f"dataset {bench.repo} at {bench.revision}"
    assert fetched.summary["eval_questions"] == len(test)
    assert fetched.summary["question_bank_sha256"] == local.summary["question_bank_sha256"]
    assert fetched.data_version == local.data_version
