"""The one place that talks to the wandb client: in a process of its own, with a time limit.

The client keeps files in the home folder, a service process, and settings that live as long as the
process: here all of that goes with a temporary folder and a child process. What logs offline has no
key in its environment, and no network in its mind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona_assets.hashing import as_json
from persona_assets.publishing.markers import KEYS, Unpublished
from persona_assets.publishing.wandb_records import Record
from persona_assets.store import Store
from persona_assets.study_schema import WandbProject

#: Where W&B is, unless WANDB_BASE_URL says otherwise.
CLOUD = "https://api.wandb.ai"
#: Files of the draft: what was to be logged, its lineage, and the run as the client logged it.
RECORD, LINEAGE, RUN = "record.json", "lineage.json", "offline-run"

#: Seconds to log a run, and to send one: the latter and a second a megabyte.
_LOG_SECONDS, _SYNC_SECONDS = 120, 120


def host() -> str:
    """The W&B server's address."""
    return (os.environ.get("WANDB_BASE_URL") or CLOUD).rstrip("/")


def target(project: WandbProject) -> str:
    """Server and project, in a word."""
    return "/".join(filter(None, (host(), project.entity, project.project)))


def log_offline(record: Record, project: WandbProject, store: Store, draft: Path) -> dict[str, Any]:
    """Log a record as an offline W&B run in ``draft``; returns the artifact's digest and entries.

    Files of the store are named by their place beside the draft, which is the landed folder's
    place too; nothing is copied.

    Raises:
        StoreError: a file has not landed or is damaged.
        RuntimeError: the client failed, or took too long.
    """
    told = as_json(asdict(record)) | {
        "run_id": record.run_id,
        "data_version": record.data_version,
        "alias": record.alias,
        "project": project.model_dump(),
        "files": {
            name: os.path.relpath(store.path(*place), draft) for name, place in record.files.items()
        },
    }
    lineage = told.pop("lineage")
    (draft / LINEAGE).write_text(json.dumps(lineage, indent=1, sort_keys=True), "utf-8")
    (draft / RECORD).write_text(json.dumps(told, indent=1, sort_keys=True), "utf-8")
    return _child("log", draft, {}, _LOG_SECONDS)


def sync(draft: Path, size: int) -> str:
    """Send what :func:`log_offline` logged, and its lineage; returns the run's URL.

    Args:
        size: Bytes of its files.

    Raises:
        Unpublished: the server cannot be reached, refused, or took too long.
    """
    key = {KEYS["wandb"]: os.environ[KEYS["wandb"]], "WANDB_BASE_URL": host()}
    try:
        return _child("sync", draft, key, _SYNC_SECONDS + size // 10**6)["url"]
    except RuntimeError as error:
        raise Unpublished(f"{host()}: {error}") from error


def _child(task: str, draft: Path, variables: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """What the child process answers; it and all that it started have ended by then."""
    command = (sys.executable, "-P", "-m", "persona_assets.publishing.wandb_child", task)
    with _home() as home:
        child = subprocess.Popen(
            command,
            cwd=draft,
            env=_environment(home) | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no end of it within {seconds:.0f} s") from error
        finally:
            _end(child)
    answer = json.loads(out.splitlines()[-1]) if child.returncode == 0 else {}
    if why := answer.get("error") or (not answer and f"the wandb client failed: {err[-2000:]}"):
        raise RuntimeError(_without_key(why, variables))
    return answer


def _end(child: subprocess.Popen) -> None:
    """End a child and the processes that it has started: its session is its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _without_key(text: str, variables: Mapping[str, str]) -> str:
    key = variables.get(KEYS["wandb"])
    return text.replace(key, "…") if key else text


@contextmanager
def _home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="persona-assets-wandb-"))
    try:
        yield home
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path) -> dict[str, str]:
    """Ours without what configures the client, and with a home for all that it writes."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    folders = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    return ours | {
        **{name: str(home) for name in folders},
        "HOME": str(home),
        "NETRC": str(home / "netrc"),
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
