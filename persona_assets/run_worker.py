"""A worker of ``persona-assets run``: a resident process that makes units, one after the other."""

from __future__ import annotations

import multiprocessing as mp
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from persona_assets import environment, residency
from persona_assets.dagster_databases import DatabaseUnusable, databases_named, in_words
from persona_assets.disk import DiskError
from persona_assets.environment import WORKER_TAG
from persona_assets.freshness import Freshness
from persona_assets.graph import Graph
from persona_assets.object_store import open_store
from persona_assets.records import unrecorded
from persona_assets.run_plan import Unit
from persona_assets.store import Store, StoreUnreachable
from persona_assets.study import load_study


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a unit."""

    status: Literal["pending", "fresh", "done", "failed", "skipped"]
    seconds: float = 0.0
    error: str = ""
    run_id: str = ""


def work(pipe: Connection, study_name: str) -> None:
    """A worker: makes units until its pipe is closed."""
    import dagster as dg

    _die_with_parent()
    environment.prepare()
    _hush()
    from persona_assets.definitions import study_definitions

    study = load_study(environment.study_file(study_name))
    definitions = study_definitions(study)
    graph, store = Graph(study), open_store(study.name)
    try:
        with databases_named(), dg.DagsterInstance.get() as instance:
            while True:
                unit = pipe.recv()
                pipe.send(attempt(unit, definitions, graph, store, instance))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        pass  # the dispatcher has gone, or wants us to
    finally:
        residency.release()


def _die_with_parent() -> None:
    """End this process when the dispatcher ends, however it ends: no orphans on a GPU."""
    parent = mp.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _hush() -> None:
    """Keep the model libraries' progress bars and deprecations out of our progress lines."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def attempt(unit: Unit, definitions, graph: Graph, store: Store, instance) -> Outcome:
    """Make a unit; what is raised on the way, of Dagster's databases above all, is an outcome."""
    try:
        with databases_named():
            return _make(unit, definitions, graph, store, instance)
    except (DatabaseUnusable, DiskError, StoreUnreachable) as error:
        return Outcome("failed", error=f"  {error}")
    except Exception:
        return Outcome("failed", error=traceback.format_exc())


def _make(unit: Unit, definitions, graph: Graph, store: Store, instance) -> Outcome:
    """One Dagster run over those of the unit's partitions that are not up to date, or on record."""
    import dagster as dg

    freshness = Freshness(graph, store)
    untold = unit.refs if unit.again else unrecorded(freshness, instance, unit.refs)
    assets = [r.asset for r in unit.refs if freshness.state(r) != "fresh" or r in untold]
    if not assets:
        return Outcome("fresh")
    started = time.perf_counter()
    result = definitions.resolve_job_def(unit.job).execute_in_process(
        instance=instance,
        partition_key=unit.key,
        asset_selection=[dg.AssetKey([graph.study.name, asset]) for asset in assets],
        raise_on_error=False,
        run_config={
            "loggers": {"console": {"config": {"log_level": "CRITICAL"}}},
            "ops": {
                f"{graph.study.name}__{asset}": {"config": {"force": unit.again}}
                for asset in assets
            },
        },
        tags={WORKER_TAG: environment.process_name()},
    )
    seconds = time.perf_counter() - started
    after = Freshness(graph, store)
    manifests = [manifest for ref in unit.refs if (manifest := after.manifest(ref))]
    if result.success:
        ours = any(manifest.provenance.run_id == result.run_id for manifest in manifests)
        # Else this run has kept what another made, and told Dagster of it.
        return Outcome("done" if ours else "fresh", seconds, run_id=result.run_id)
    found = [
        f"  {manifest.ref} failed {audit.name}: {audit.observed}; asked for: {audit.threshold}. "
        f"{audit.remedy}"
        for manifest in manifests
        if manifest.provenance.run_id == result.run_id
        for audit in manifest.blocking_failures
    ] or [f"  {in_words(message)}" for message in _messages(result)]
    where = f"  (Dagster run {result.run_id} has the whole log)"
    return Outcome("failed", seconds, "\n".join([*found, where]), result.run_id)


def _messages(result) -> Iterator[str]:
    """What the asset raised in each failed step: Dagster wraps it once, libraries lie below."""
    for event in result.all_events:
        if event.is_step_failure and event.event_specific_data.error:
            error = event.event_specific_data.error
            yield (error.cause or error).message.strip()
