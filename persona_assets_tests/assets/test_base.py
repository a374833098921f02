"""How an asset makes a partition: kept or made again, tried again or not, refused, in words."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from time import monotonic

import dagster as dg
import polars as pl
import pytest
import yaml
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.runs.sqlite.sqlite_run_storage import SqliteRunStorage
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG
from sqlalchemy.exc import OperationalError

from persona_assets import environment
from persona_assets.assets import base
from persona_assets.assets.base import Made, build_asset
from persona_assets.assets.metadata import table_preview
from persona_assets.audit import audit
from persona_assets.environment import PROCESS_TAG, process_name
from persona_assets.graph import Graph
from persona_assets.hub import HubError
from persona_assets.object_store import ObjectStore
from persona_assets.store import Ref, Store
from persona_assets.unavailable import Unavailable
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.test_audit import TEXTS

BANK = Ref("question_bank")
WAITS = (0.4, 0.1, 0.1)
RUN_RETRIES = yaml.safe_load((PROJECT / "dagster.yaml").read_text("utf-8"))["run_retries"]
WILL_RETRY = "dagster/will_retry"


class Maker:
    """Lands a table, after the ``errors`` that it raises first, one a try.

    Attributes:
        tries: When it was called.
    """

    def __init__(self, *errors: Exception):
        self.errors, self.tries, self.audits = list(errors), [], []

    def __call__(self, task) -> Made:
        self.tries.append(monotonic())
        task.write(pl.DataFrame({"question_id": ["a", "b"]}), "questions")
        if self.errors:
            raise self.errors.pop(0)
        preview = table_preview(pl.DataFrame({"try": [len(self.tries)]}))
        return Made(audits=self.audits, metadata=preview)

    __name__, __code__ = "maker", __call__.__code__


@pytest.fixture
def bench(length_matched, tmp_path, monkeypatch):
    """``question_bank`` of ``length_matched``, which is in the pool ``hub``, on a real instance."""
    monkeypatch.setattr(base, "RETRY_WAITS", WAITS)
    monkeypatch.delenv(environment.ARC_DIR, raising=False)
    return Bench(Graph(length_matched), tmp_path)


class Bench:
    def __init__(self, graph: Graph, folder: Path):
        self.graph, self.folder = graph, folder
        self.store = Store(folder / "store", graph.study.name)
        (folder / "home").mkdir()

    def make(self, maker, force: bool | None = None, ref: Ref = BANK):
        asset = self.graph.assets[ref.asset]
        definition = build_asset(self.graph, asset, maker, self.store)
        name = f"{self.graph.study.name}__{ref.asset}"
        config = {} if force is None else {"ops": {name: {"config": {"force": force}}}}
        # By steps, so that a claim on the pool could be left behind.
        with dg.instance_for_test(
            temp_dir=str(self.folder / "home"),
            overrides={
                "concurrency": {"pools": {"default_limit": 1, "granularity": "op"}},
                "run_retries": RUN_RETRIES,
            },
        ) as instance:
            done = dg.materialize(
                [definition],
                instance=instance,
                partition_key=ref.key,
                raise_on_error=False,
                run_config=config,
            )
            info = instance.event_log_storage.get_concurrency_info("hub")
            assert (info.active_slot_count, info.pending_step_count) == (0, 0)
        drafts = list(self.folder.rglob(".draft-*"))
        assert drafts == []
        return done

    def tags(self, done) -> dict[str, str]:
        """Those of a run."""
        with dg.DagsterInstance.local_temp(str(self.folder / "home")) as instance:
            return instance.get_run_by_id(done.run_id).tags


def shown(done) -> dict:
    """The metadata of the run's only materialization."""
    (event,) = done.get_asset_materialization_events()
    metadata = event.materialization.metadata
    return {name: value.value for name, value in metadata.items()}


def error_of(done) -> str:
    (event,) = [event for event in done.all_events if event.is_step_failure]
    error = event.event_specific_data.error
    return (error.cause or error).message


def retries(done) -> list[float]:
    return [
        event.event_specific_data.seconds_to_wait
        for event in done.all_events
        if event.event_type == dg.DagsterEventType.STEP_UP_FOR_RETRY
    ]


def test_a_service_that_comes_back_is_asked_again_after_a_growing_while(bench):
    maker = Maker(Unavailable("hub is down"), Unavailable("hub is down"))
    done = bench.make(maker)
    assert done.success
    assert len(maker.tries) == 3
    waits = retries(done)
    assert all(0.75 * most <= wait <= most for wait, most in zip(waits, WAITS))
    assert len(waits) == 2
    passed = [after - before for before, after in pairwise(maker.tries)]
    assert all(spent >= wait for spent, wait in zip(passed, waits))
    assert bench.store.landed(BANK).provenance.run_id == done.run_id
    assert len(done.get_asset_materialization_events()) == 1


def test_a_service_that_stays_away_fails_the_asset_in_its_own_words(bench):
    maker = Maker(*[Unavailable("hub is down")] * 9)
    done = bench.make(maker)
    assert not done.success
    assert len(maker.tries) == 1 + len(WAITS)
    assert error_of(done).strip().endswith("Unavailable: hub is down")
    assert bench.store.manifest(BANK) is None
    assert bench.tags(done)[WILL_RETRY] == "false"


@pytest.mark.parametrize("error", [HubError("no such commit"), ValueError("bad row"), OSError(28)])
def test_bad_input_is_tried_once(bench, error):
    maker = Maker(*[error] * 9)
    done = bench.make(maker)
    assert not done.success
    assert len(maker.tries) == 1
    assert retries(done) == []
    assert type(error).__name__ in error_of(done)
    assert bench.tags(done)[WILL_RETRY] == "false"


def test_the_assets_own_error_is_told_though_the_database_cannot_be_written(bench, monkeypatch):
    def add_run_tags(self, run_id, new_tags):
        if RETRY_ON_ASSET_OR_OP_FAILURE_TAG in new_tags:
            raise OperationalError("UPDATE", {}, Exception("database or disk is full"))
        add_tags(self, run_id, new_tags)

    add_tags = SqliteRunStorage.add_run_tags
    monkeypatch.setattr(SqliteRunStorage, "add_run_tags", add_run_tags)
    assert error_of(bench.make(Maker(ValueError("bad row")))).strip() == "ValueError: bad row"


@pytest.mark.parametrize("event", ["STEP_START", "ASSET_MATERIALIZATION", "STEP_SUCCESS"])
def test_a_run_under_which_the_database_is_cut_off_is_started_again(bench, event, monkeypatch):
    """What it had landed by then is kept."""
    maker, store_event = Maker(), SqliteEventLogStorage.store_event

    def cut_off(self, entry):
        if entry.is_dagster_event and entry.dagster_event_type.value == event:
            raise OperationalError("INSERT", {}, Exception("server closed the connection"))
        store_event(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(SqliteEventLogStorage, "store_event", cut_off)
        done = bench.make(maker)
    assert not done.success
    assert bench.tags(done)[WILL_RETRY] == "true"
    assert bench.make(maker).success
    assert len(maker.tries) == 1


def test_what_is_up_to_date_is_kept_with_all_it_has_to_show(bench):
    maker = Maker()
    first = shown(bench.make(maker))
    again = bench.make(maker)
    assert again.success
    assert len(maker.tries) == 1
    assert shown(again) == first
    assert first["made_by"] != again.run_id
    assert "| 1 |" in first["preview"]
    assert first["dagster/row_count"] == 2


def test_who_makes_it_by_hand_is_known_to_dagster(bench):
    """So that run monitoring ends the run of a process that was killed."""
    assert bench.tags(bench.make(Maker()))[PROCESS_TAG] == process_name()


def test_force_makes_it_again(bench):
    maker = Maker()
    bench.make(maker)
    forced = bench.make(maker, force=True)
    assert len(maker.tries) == 2
    assert shown(forced)["made_by"] == forced.run_id
    assert bench.store.landed(BANK).provenance.run_id == forced.run_id
    bench.make(maker, force=False)
    assert len(maker.tries) == 2


def test_what_failed_a_blocking_check_is_made_again_unasked(bench):
    maker = Maker()
    maker.audits = [audit("train_eval_identities", False, **TEXTS)]
    failed = bench.make(maker)
    assert not failed.success
    assert bench.tags(failed)[WILL_RETRY] == "false"
    maker.audits = [audit("train_eval_identities", True, **TEXTS)]
    assert bench.make(maker).success
    assert len(maker.tries) == 2


def test_what_is_stale_or_damaged_is_made_again_unasked(bench):
    maker = Maker()
    bench.make(maker)
    manifest = bench.store.landed(BANK)
    (bench.store.folder(BANK) / manifest.version / "questions.parquet").write_text("cut off")
    assert bench.make(maker).success
    assert len(maker.tries) == 2


def test_what_would_be_kept_is_read_first_and_made_again_if_a_bit_of_it_differs(bench):
    maker = Maker()
    bench.make(maker)
    manifest = bench.store.landed(BANK)
    path = bench.store.folder(BANK) / manifest.version / "questions.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert bench.store.damage(manifest) == ""
    assert bench.make(maker).success
    assert len(maker.tries) == 2
    assert path.read_bytes() == content
    bench.make(maker)
    assert len(maker.tries) == 2


def test_nothing_is_made_before_what_it_is_made_from(bench):
    maker, dataset = Maker(), Ref("training_dataset", "librarian.garbage_cot.42")
    done = bench.make(maker, force=True, ref=dataset)
    assert maker.tries == []
    message = error_of(done)
    assert "training_dataset[librarian.garbage_cot.42] cannot be made yet" in message
    assert "question_bank has not landed" in message
    assert message.strip().endswith("Materialize question_bank first.")


def test_the_launchpad_explains_the_config(length_matched, tmp_path):
    graph = Graph(length_matched)
    definition = build_asset(
        graph, graph.assets["tokenizer"], Maker(), Store(tmp_path, "length_matched")
    )
    fields = definition.op.config_schema.config_type.fields
    assert list(fields) == ["force"]
    assert fields["force"].default_value is False
    assert "although it has landed and is up to date" in fields["force"].description


def test_the_instance_tries_lost_runs_again(tmp_path, monkeypatch):
    """``dagster.yaml`` as it is, read by Dagster."""
    monkeypatch.setenv("DAGSTER_HOME", str(PROJECT))
    monkeypatch.setenv(environment.DAGSTER_STORAGE, str(tmp_path))
    with dg.DagsterInstance.get() as instance:
        assert instance.run_retries_enabled
        assert instance.run_retries_max_retries == 1
        assert instance.run_retries_retry_on_asset_or_op_failure
        assert instance.run_monitoring_enabled
        assert instance.run_launcher.supports_check_run_worker_health
        pools = instance.get_concurrency_config().pool_config
        assert (pools.default_pool_limit, pools.pool_granularity.value) == (1, "run")
        queue = instance.get_concurrency_config().run_queue_config
        assert queue.max_concurrent_runs == 12  # more than the workers of `persona-assets run`
        assert list(queue.tag_concurrency_limits) == [{"key": "dagster/backfill", "limit": 10}]


def test_what_another_machine_landed_is_kept_and_its_table_told(bench):
    maker, table = Maker(), "dagster/row_count"
    bench.store = ObjectStore("memory://kept", bench.folder / "one", bench.graph.study.name)
    made = shown(bench.make(maker))
    bench.store = ObjectStore("memory://kept", bench.folder / "other", bench.graph.study.name)
    kept = shown(bench.make(maker))
    assert len(maker.tries) == 1
    assert made[table] == kept[table] == 2
    assert kept["path"] == f"memory://kept/length_matched/question_bank/{version_of(bench)}"


def version_of(bench: Bench) -> str:
    return bench.store.landed(BANK).version
