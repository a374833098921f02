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
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from persona_assets.hashing import as_json
from persona_assets.publishing.markers import KEYS, Unpublished
from persona_assets.publishing.wandb_child import FILES, RECORD, RUN
from persona_assets.publishing.wandb_records import Record, version_alias
from persona_assets.store import Store
from persona_assets.study_schema import WandbProject

#: Where W&B is, unless WANDB_BASE_URL says otherwise.
CLOUD = "https://api.wandb.ai"
#: The artifact's file with the lineage; in the draft, too.
LINEAGE = "lineage.json"

#: Seconds to reach the server, to log a run, and to send one: the latter and one a megabyte.
_REACH_SECONDS, _LOG_SECONDS, _SYNC_SECONDS = 10, 120, 120


class ClientFailed(RuntimeError):
    """The wandb client failed, or took too long; says how in a sentence, without the key."""


def host() -> str:
    """The W&B server's address."""
    return (os.environ.get("WANDB_BASE_URL") or CLOUD).rstrip("/")


def target(project: WandbProject) -> str:
    """Server and project, in a word."""
    return "/".join(filter(None, (_shown(host()), project.entity, project.project)))


def _shown(address: str) -> str:
    """An address without the password that it may hold."""
    scheme, mark, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}{mark}{place.rpartition('@')[2]}{slash}{path}"


def log_offline(record: Record, project: WandbProject, store: Store, draft: Path) -> dict[str, Any]:
    """Log a record as an offline W&B run in ``draft``; returns the artifact's digest and entries.

    Raises:
        StoreError: a file has not landed or is damaged.
        ClientFailed: it was not logged.
    """
    told = as_json(asdict(record)) | {
        "run_id": record.run_id,
        "data_version": record.data_version,
        "alias": record.alias,
        "consumed": {
            name: version_alias(version["data_version"])
            for name, version in record.consumes.items()
        },
        "project": project.model_dump(),
        "files": sorted([*record.files, LINEAGE]),
    }
    lineage = told.pop("lineage")
    (draft / LINEAGE).write_text(json.dumps(lineage, indent=1, sort_keys=True), "utf-8")
    (draft / RECORD).write_text(json.dumps(told, indent=1, sort_keys=True), "utf-8")
    _lay(record, store, draft, draft, os.symlink)
    logged = _child("log", draft, {}, _LOG_SECONDS)
    shutil.rmtree(draft / FILES)
    return logged


def sync(record: Record, store: Store, draft: Path) -> str:
    """Send what :func:`log_offline` logged, and its lineage; returns the run's URL.

    The client removes each file of an offline artifact once it has sent it, wherever that is: it
    gets copies of all.

    Raises:
        Unpublished: the server cannot be reached, refused, or took too long.
        StoreError: a file is damaged.
    """
    key = {KEYS["wandb"]: os.environ[KEYS["wandb"]], "WANDB_BASE_URL": host()}
    try:
        _reach(host())
        with tempfile.TemporaryDirectory(dir=draft) as name:
            copy = Path(name)
            shutil.copyfile(draft / RECORD, copy / RECORD)
            shutil.copytree(draft / RUN, copy / RUN)
            _lay(record, store, draft, copy, shutil.copyfile)
            size = sum(path.stat().st_size for path in copy.rglob("*") if path.is_file())
            return _child("sync", copy, key, _SYNC_SECONDS + size // 10**6)["url"]
    except ClientFailed as error:
        raise Unpublished(f"{_shown(host())}: {error}") from error


def _lay(
    record: Record, store: Store, draft: Path, folder: Path, put: Callable[[Path, Path], object]
) -> None:
    """Put the artifact's files below ``folder``, where the offline run says that they are."""
    places = {name: store.path(*place) for name, place in record.files.items()}
    for name, path in (places | {LINEAGE: draft / LINEAGE}).items():
        target = folder / FILES / name
        target.parent.mkdir(parents=True, exist_ok=True)
        put(path, target)


def _reach(address: str) -> None:
    """Raise ClientFailed where nothing listens: the client would try again for a long time."""
    where = urlsplit(address)
    if where.scheme in getproxies():
        return  # that is the proxy's to say
    port = where.port or {"http": 80}.get(where.scheme, 443)
    try:
        socket.create_connection((where.hostname or "", port), timeout=_REACH_SECONDS).close()
    except OSError as error:
        raise ClientFailed(f"it cannot be reached ({error})") from error


def _child(task: str, folder: Path, variables: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """What the child process answers; it and all that it started have ended by then."""
    command = (sys.executable, "-P", "-m", "persona_assets.publishing.wandb_child", task)
    ours, its = os.pipe()[::-1]  # its end closes with this process, however that ends
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as home:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(home) | variables,
            stdin=its,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired as error:
            raise ClientFailed(f"no end of it within {seconds:.0f} s") from error
        finally:
            _end(child)
            os.close(ours)
            os.close(its)
    try:
        answer = json.loads(out.splitlines()[-1]) if child.returncode == 0 else {}
    except (IndexError, ValueError):
        answer = {}
    if why := answer.get("error") or (not answer and f"the wandb client failed: {err[-2000:]}"):
        raise ClientFailed(_without_key(why, variables))
    return answer


def _end(child: subprocess.Popen) -> None:
    """End a child and the processes that it has started: its session is its own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _without_key(text: str, variables: Mapping[str, str]) -> str:
    key = variables.get(KEYS["wandb"])
    return text.replace(host(), _shown(host())).replace(key or "\0", "…")


def _environment(home: str) -> dict[str, str]:
    """Ours without what configures the client, and with a home for all that it writes."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    folders = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR")
    return ours | {
        **dict.fromkeys(folders, home),
        "HOME": home,
        "NETRC": os.devnull,  # where a login writes the key
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
    }
