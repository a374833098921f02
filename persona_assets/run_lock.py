"""The lock of a ``persona-assets run``: one run of a study at a time, and nobody beside it.

It dies with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from persona_assets.store import Store

#: Seconds that a run tries for the lock: longer than anybody takes to look whether it is held.
_PATIENCE = 1.0


class AlreadyRunning(RuntimeError):
    """Two runs of one study would do everything twice."""


@contextmanager
def only_run(store: Store) -> Iterator[None]:
    """Hold the study's run lock.

    Raises:
        AlreadyRunning: another process holds it.
    """
    store.root.mkdir(parents=True, exist_ok=True)
    with _lock_file(store).open("w") as file:
        deadline = time.monotonic() + _PATIENCE
        while not _taken(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise AlreadyRunning(
                    f"another `persona-assets run` of study {store.study} is at work; wait for it, "
                    "or stop it"
                )
            time.sleep(0.05)
        yield


def is_running(store: Store) -> bool:
    """Whether a ``persona-assets run`` of the study is at work.

    Looking takes a share of the lock for an instant, which :func:`only_run` waits out.
    """
    try:
        with _lock_file(store).open() as file:
            return not _taken(file, fcntl.LOCK_SH)
    except FileNotFoundError:
        return False


def _lock_file(store: Store) -> Path:
    return store.root / ".run.lock"


def _taken(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
