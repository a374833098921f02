"""``python -m persona_assets.publishing.wandb_child log|sync``, in a draft of :mod:`wandb_client`.

Prints its answer as the last line, in JSON. Imports nothing that it can do without: it is started
for each run.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

#: Of the draft: what is to be logged, the run as the client has logged it; and while the client is
#: at work, the artifact's files.
RECORD, RUN, FILES = "record.json", "offline-run", "files"


def log() -> dict[str, Any]:
    """Log the record as an offline run, keep of it what a sync needs, and note its digest."""
    import wandb

    record = json.loads(Path(RECORD).read_text("utf-8"))
    run = wandb.init(
        id=record["run_id"],
        name=record["name"],
        group=record["group"],
        job_type=record["job_type"],
        tags=record["tags"],
        config=record["config"]
        | {"provenance": record["provenance"], "data_version": record["data_version"]},
        settings=_hermetic(mode="offline", **record["project"]),
    )
    for values in record["history"]:
        run.log({name: value for name, value in values.items() if name != "step"}, values["step"])
    run.summary.update(record["summary"])
    artifact = wandb.Artifact(
        record["artifact"],
        type=record["job_type"],
        description=record["description"],
        metadata={name: record[name] for name in ("study", "data_version", "upstream", "consumes")}
        | record["provenance"],
    )
    for name in record["files"]:  # a path that says nothing of where this is
        artifact.add_file(f"{FILES}/{name}", name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["latest", record["alias"]])
    logged = Path(run.settings.sync_dir)
    run.finish()
    wandb.teardown()
    os.mkdir(RUN)
    shutil.move(logged / f"run-{run.id}.wandb", RUN)
    entries = {name: entry.digest for name, entry in artifact.manifest.entries.items()}
    Path(RECORD).write_text(json.dumps(record | {"digest": artifact.digest}, indent=1), "utf-8")
    return {"digest": artifact.digest, "entries": entries}


def sync() -> dict[str, Any]:
    """Log in through dagster-wandb's resource, sync the run, declare what it consumes."""
    import dagster as dg
    from dagster_wandb import wandb_resource

    record = json.loads(Path(RECORD).read_text("utf-8"))
    (logged,) = Path(RUN).glob("*.wandb")
    login = {"api_key": {"env": "WANDB_API_KEY"}, "host": os.environ["WANDB_BASE_URL"]}
    with dg.build_resources(
        {"wandb": wandb_resource}, resource_config={"wandb": {"config": login}}
    ) as resources:
        wandb = resources.wandb["sdk"]
        from wandb.cli.cli import cli

        api, project = wandb.Api(), record["project"]["project"]
        entity = record["project"]["entity"] or api.default_entity
        cli.main(["sync", "--entity", entity, str(logged)], standalone_mode=False)
        if not logged.with_suffix(".wandb.synced").exists():
            return {"error": "the run was not synced"}
        artifact = api.artifact(f"{entity}/{project}/{record['artifact']}:{record['alias']}")
        if artifact.digest != record["digest"]:  # a sync says nothing of what an artifact lacks
            return {"error": f"artifact {artifact.name} has digest {artifact.digest} there"}
        for name, alias in record["consumed"].items():
            consumed = api.artifact(f"{entity}/{project}/{name}:{alias}")
            resources.wandb["api"].use_artifact(
                consumed.id,
                entity_name=entity,
                project_name=project,
                run_name=record["run_id"],
                artifact_entity_name=consumed.entity,
                artifact_project_name=consumed.project,
            )
    place = {"base_url": login["host"], "entity": entity, "project": project}
    return {"url": wandb.Settings(**place, run_id=record["run_id"]).run_url}


def _hermetic(**settings: Any):
    """Client settings under which a run tells nothing of machine, code or environment."""
    import wandb

    return wandb.Settings(
        console="off",
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        symlink=False,
        host="",
        program="",
        label_disable=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
        **settings,
    )


def _cause(error: BaseException) -> str:
    """What lies under Dagster's and the client's own wrapping, in a word."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """End this process group when the other end of the pipe at stdin is closed."""
    os.read(0, 1)  # sys.stdin has a lock, which the interpreter wants at its end
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer = {"log": log, "sync": sync}[sys.argv[1]]()
    except Exception as error:
        answer = {"error": _cause(error)}
    print(json.dumps(answer))
