"""``python -m persona_assets.publishing.wandb_child log|sync``, in a draft of :mod:`wandb_client`.

Prints its answer as the last line, in JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from persona_assets.publishing.wandb_client import LINEAGE, RECORD, RUN
from persona_assets.publishing.wandb_records import version_alias


def log() -> dict[str, Any]:
    """Log the record as an offline run, and keep of it what a sync needs."""
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
    for name, path in (record["files"] | {LINEAGE: LINEAGE}).items():
        artifact.add_file(path, name, policy="immutable", skip_cache=True)
    run.log_artifact(artifact, aliases=["latest", record["alias"]])
    logged = Path(run.settings.sync_dir)
    run.finish()
    wandb.teardown()
    os.mkdir(RUN)
    os.rename(logged / f"run-{run.id}.wandb", Path(RUN, f"run-{run.id}.wandb"))
    entries = {name: entry.digest for name, entry in artifact.manifest.entries.items()}
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

        cli.main(["sync", str(logged)], standalone_mode=False)
        done = logged.with_suffix(".wandb.synced")
        if not done.exists():
            return {"error": "the run was not synced"}
        done.unlink()
        api = wandb.Api()
        project = record["project"]
        place = f"{project['entity'] or api.default_entity}/{project['project']}"
        run = api.run(f"{place}/{record['run_id']}")
        for name, version in record["consumes"].items():
            alias = version_alias(version["data_version"])
            run.use_artifact(api.artifact(f"{place}/{name}:{alias}"))
        return {"url": run.url}


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


if __name__ == "__main__":
    print(json.dumps({"log": log, "sync": sync}[sys.argv[1]]()))
