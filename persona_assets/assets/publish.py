"""Group ``publish``: cells and bundles for Weights & Biases, repositories on the hub."""

from __future__ import annotations

import json
import os
from typing import Any, cast

import dagster as dg

from persona_assets import environment
from persona_assets.assets.base import Made, Task
from persona_assets.hub_client import RepoType
from persona_assets.publishing import hub_content, wandb_client
from persona_assets.publishing.hub_card import carry_over
from persona_assets.publishing.hub_upload import require_token, upload
from persona_assets.publishing.markers import KEYS, Markers, published_audit
from persona_assets.publishing.wandb_records import Record, bundle_record, cell_record
from persona_assets.store import write_atomically


def wandb_run(task: Task) -> Made:
    """One cell's run, logged offline, and synced where there is a key."""
    return _logged(task, cell_record(task.graph, task.store, task.ref))


def wandb_bundle(task: Task) -> Made:
    """One bundle's artifact, logged offline, and synced where there is a key."""
    return _logged(task, bundle_record(task.graph, task.store, task.ref))


def hub_upload(task: Task) -> Made:
    """One of the study's repositories on the hub: what has landed, in one commit or none."""
    study = task.study
    kind = cast(RepoType, task.key)
    repository = hub_content.repository(study, kind)
    require_token(repository)  # before gigabytes are hashed
    files = hub_content.content(study, task.store, kind)
    done = upload(
        repository,
        files,
        f"Study {study.name}: {len(files)} files",
        f"Study file {study.content_hash}",
    )
    record = {
        "repo": repository.name,
        "repo_type": repository.kind,
        "commit": done.commit,
        "files": len(files),
    }
    write_atomically(task.draft / "commit.json", json.dumps(record, indent=1) + "\n")
    metadata: dict[str, Any] = {"url": dg.MetadataValue.url(repository.page(done.commit))}
    if kind == "model":
        sections = carry_over(study, hub_content.made_here(study), done.commit)
        metadata["import"] = dg.MetadataValue.md(sections)
    changes = {"written": len(done.written), "removed": len(done.removed)}
    return Made(summary=record | changes, metadata=metadata)


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
    key = KEYS["wandb"]
    marker = Markers(environment.publish_dir(), task.study.name).publish(
        task.ref,
        record.data_version,
        wandb_client.target(project),
        (lambda: wandb_client.sync(record, task.store, task.draft))
        if os.environ.get(key)
        else f"{key} is not set",
    )
    pending = os.environ.get(key) and marker.status == "pending"
    return Made(
        audits=[published_audit(marker)],
        summary=summary,
        metadata={"url": dg.MetadataValue.url(marker.url)} if marker.url else {},
        data_version=record.data_version,
        warnings=[f"{task.ref} is pending, {marker.why}"] if pending else [],
    )
