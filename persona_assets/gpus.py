"""GPUs: which there are, and one for each process that wants one.

A process leases a GPU before it loads a model and keeps it until it ends, however it ends: the
lease is a lock on a file in the data folder, which machines may share. The GPUs are those of
CUDA_VISIBLE_DEVICES where that is set, else all of the machine's. A Ray job has what Ray has
reserved for it, a share of a GPU maybe, and leases nothing. Nothing here needs torch.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import platform
from pathlib import Path
from typing import IO

from persona_assets import environment
from persona_assets.unavailable import Unavailable

VISIBLE = "CUDA_VISIBLE_DEVICES"
#: Ray sets this for the process of a job, and :data:`VISIBLE` to the GPUs that it has reserved.
RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"

#: The lease of this process: its GPU and the locked file. Held open until the process ends.
_leased: tuple[str, IO[str]] | None = None


class NoFreeGpu(Unavailable):
    """Every GPU of the machine is leased by another process."""


def visible() -> list[str]:
    """The GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    stated = os.environ.get(VISIBLE)
    if stated is not None:
        names = [name.strip() for name in stated.split(",")]
        # As CUDA does: what follows the first name that means none is not seen.
        return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))
    if RAY_JOB in os.environ:
        return []
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def unleased() -> list[str]:
    """Those of the visible GPUs that no process holds at this moment; one's own is held."""
    free = []
    for name in visible():
        with _lock_file(name).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            free.append(name)
    return free


def lease() -> str | None:
    """This process's GPU, taken at the first call; None on a machine without any.

    CUDA is told through CUDA_VISIBLE_DEVICES, so this must come before its first use.

    Raises:
        NoFreeGpu: others hold them all; names their processes.
    """
    global _leased
    if _leased is not None:
        return _leased[0]
    if RAY_JOB in os.environ:
        return next(iter(visible()), None)
    holders = []
    for name in visible():
        file = _lock_file(name).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holders.append(f"GPU {name} by process {file.read().strip() or 'unknown'}")
            file.close()
            continue
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        os.environ[VISIBLE] = name
        _leased = (name, file)
        return name
    if holders:
        raise NoFreeGpu(
            f"no GPU is free: {', '.join(holders)}. Wait for them, or allow no more runs at once "
            "than there are GPUs (pool gpu, --workers); an engine server holds one for itself."
        )
    return None


def _lock_file(name: str) -> Path:
    folder = environment.data_dir() / "gpus" / platform.node()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.replace('/', '_')}.lock"
