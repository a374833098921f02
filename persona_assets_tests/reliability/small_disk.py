"""Disks that refuse: full, read-only, another's. Each is a context in which this process lives."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MOUNT = "mount"
#: Bytes that a tmpfs gives at a time.
PAGE = 4096
_ROOMY = "512m"
_CAPABILITIES_V3 = 0x20080522
#: To write and to read what modes forbid: root has both.
_DAC = (1 << 1) | (1 << 2)


@dataclass(frozen=True)
class SmallDisk:
    """A folder whose room is set.

    Attributes:
        folder: A tmpfs of its own where mounting is allowed; else what is full is stood in for by
            a limit on the size of files, and what is read-only is not to be had.
        mounted: Which of the two.
    """

    folder: Path
    mounted: bool

    @property
    def how(self) -> str:
        return "a small tmpfs" if self.mounted else "RLIMIT_FSIZE, as nothing may be mounted here"

    @contextmanager
    def full(self, free: int) -> Iterator[None]:
        """No more than ``free`` bytes can be written (by file, where nothing is mounted)."""
        if not self.mounted:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
            try:
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            return
        used = shutil.disk_usage(self.folder).used
        self._remount(f"size={used + free // PAGE * PAGE}")
        try:
            yield
        finally:
            self._remount(f"size={_ROOMY}")

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written."""
        self._remount("ro")
        try:
            yield
        finally:
            self._remount("rw")

    def _remount(self, option: str) -> None:
        subprocess.run([_MOUNT, "-o", f"remount,{option}", self.folder], check=True)


@contextmanager
def small_disk(folder: Path) -> Iterator[SmallDisk]:
    """A disk on an empty folder, made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [_MOUNT, "-t", "tmpfs", "-o", f"size={_ROOMY}", "tmpfs", str(folder)]
    mounted = not subprocess.run(command, capture_output=True, check=False).returncode
    try:
        yield SmallDisk(folder, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def forbidden(folder: Path) -> Iterator[None]:
    """Modes forbid to write below ``folder``, and root is not above them."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_V3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    _checked(libc.capget(header, sets))
    effective = sets[0]
    sets[0] &= ~_DAC
    _checked(libc.capset(header, sets))
    try:
        yield
    finally:
        sets[0] = effective
        _checked(libc.capset(header, sets))
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)


def _checked(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


_BACKWARDS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static double since;
static int (*real)(clockid_t, struct timespec *);
__attribute__((constructor)) static void start(void) {
    real = dlsym(RTLD_NEXT, "clock_gettime");
    since = atof(getenv("BACKWARDS_SINCE"));
}
int clock_gettime(clockid_t id, struct timespec *t) {
    if (!real) start();
    int status = real(id, t);
    if (status || (id != CLOCK_REALTIME && id != CLOCK_REALTIME_COARSE)) return status;
    double now = t->tv_sec + t->tv_nsec * 1e-9, then = since - 60 * (now - since);
    t->tv_sec = (time_t) then;
    t->tv_nsec = (long) ((then - (double) t->tv_sec) * 1e9);
    return 0;
}
int gettimeofday(struct timeval *t, void *zone) {
    struct timespec s;
    int status = clock_gettime(CLOCK_REALTIME, &s);
    t->tv_sec = s.tv_sec;
    t->tv_usec = s.tv_nsec / 1000;
    return status;
}
time_t time(time_t *t) {
    struct timespec s;
    clock_gettime(CLOCK_REALTIME, &s);
    if (t) *t = s.tv_sec;
    return s.tv_sec;
}
"""


def backwards_clock(folder: Path) -> Path | None:
    """A library that lets a process's clock run backwards, a minute a second; None: no compiler.

    Preloaded, it wants the moment to start from in ``BACKWARDS_SINCE``.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "backwards.c", folder / "backwards.so"
    source.write_text(_BACKWARDS)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
