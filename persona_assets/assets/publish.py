"""Group ``publish``: cells and bundles for Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Callable

import dagster as dg

from persona_assets import environment
from persona_assets.assets.base import Made, Task
from persona_assets.publishing import wandb_client
from persona_assets.publishing.markers import KEYS, Markers, published_audit
from persona_assets.publishing.wandb_records import Record, bundle_record, cell_record


def wandb_run(task: Task) -> Made:
    """One cell's run, logged offline, and synced where there is a key."""
    return _logged(task, cell_record(task.graph, task.store, task.ref))


def wandb_bundle(task: Task) -> Made:
    """One bundle's artifact, logged offline, and synced where there is a key."""
    return _logged(task, bundle_record(task.graph, task.store, task.ref))


def _logged(task: Task, record: Record) -> Made:
    project = task.study.publish.wandb
    logged = wandb_client.log_offline(record, project, task.store, task.draft)
    size = sum(task.store.landed(ref).files[name]["bytes"] for ref, name in record.files.values())
    summary = {
        "wandb_run": record.run_id,
        "artifact": f"{record.artifact}:{record.alias}",
        "artifact_digest": logged["digest"],
        "files": len(logged["entries"]),
        "bytes": size,
    }
    target = wandb_client.target(project)
    return sent(
        task,
        "wandb",
        target,
        record.data_version,
        lambda: wandb_client.sync(task.draft, size),
        summary,
    )


def sent(
    task: Task, place: str, target: str, data_version: str, send: Callable[[], str], summary: dict
) -> Made:
    """What a publish asset has made, sent to its place where there is a key for that.

    Args:
        place: A key of ``markers.KEYS``.
        target: Where there, in a word.
        data_version: Of the content.
        send: Sends it and returns its URL; raises ``Unpublished``.
        summary: Of the partition.
    """
    variable = KEYS[place]
    has_key = bool(os.environ.get(variable))
    marker = Markers(environment.publish_dir(), task.study.name).publish(
        task.ref, data_version, target, send if has_key else f"{variable} is not set"
    )
    pending = has_key and marker.status == "pending"
    return Made(
        audits=[published_audit(marker)],
        summary=summary,
        metadata={"url": dg.MetadataValue.url(marker.url)} if marker.url else {},
        data_version=data_version,
        warnings=[f"{task.ref} is pending, {marker.why}"] if pending else [],
    )
