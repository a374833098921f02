"""What a disk refuses, in words: the path, the reason, and what is needed there."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

#: What libraries in other languages raise by types of their own: known by the system's words.
_IN_WORDS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
#: Bytes free on a full disk, at most. Polars, say, calls it a fault of its own if the last few of a
#: file find no room.
_HARDLY_ANY = 1 << 16
_REFUSALS = (*_IN_WORDS, errno.EACCES, errno.EPERM)


class DiskError(RuntimeError):
    """A folder cannot be written; names the path and what is needed."""


def refusal(error: BaseException, path: Path) -> str | None:
    """Path, reason and remedy, where ``error`` says that a disk refused something; else None.

    Args:
        path: Where it was, if the error does not say.
    """
    said = ""
    if isinstance(error, OSError):
        code = error.errno if error.errno in _REFUSALS else None
        path = Path(error.filename) if isinstance(error.filename, str) else path
    else:
        text = str(error)
        code = next((code for code in _IN_WORDS if os.strerror(code) in text), None)
        if code is None and _usage(path).free < _HARDLY_ANY:
            code, said = errno.ENOSPC, f"{text}, and "
    if code is None:
        return None
    return f"{said}{path}: {os.strerror(code)}. {_remedy(code, path)}"


def _remedy(code: int, path: Path) -> str:
    match code:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{room(path)}: make room, then run it again."
        case errno.EFBIG:
            return "Files may be no larger here: raise the limit (ulimit -f), then run it again."
        case errno.EROFS:
            return "Mount its file system for writing, then run it again."
        case errno.EACCES | errno.EPERM:
            return f"User {os.getuid()} needs the right to write there: grant it, then run again."
    return "The disk fails: look at the system's log, move the data folder to another."


def room(path: Path) -> str:
    """What is free on the file system of a path that need not exist any more, in words."""
    usage = _usage(path)
    return f"{usage.free} of {usage.total} bytes are free there"


def _usage(path: Path):
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(there)


def require_writable(folder: Path) -> None:
    """See that files can be made in a folder, which is made if it is missing.

    Raises:
        DiskError: they cannot.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()
    except OSError as error:
        with suppress(OSError):
            probe.unlink()
        what = refusal(error, probe) or f"{folder} cannot be written ({error})."
        raise DiskError(what) from error
