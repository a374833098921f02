"""The memory of a process and of all that it starts, over time, by what each process is."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from persona_assets_tests.reliability.table import Row

#: What a long-lived process of ``persona-assets ui`` is, by a word of its command line. Others
#: (run workers) come and go.
SERVICES = {
    "dagster_webserver": "webserver",
    "dagster._daemon": "daemon",
    "code-server": "code server",
    "grpc": "code server",
    "dagster dev": "process that starts them",
}
#: Memory is bounded if it is never more MiB than this, and if the last third's median is at most
#: this times the second third's (what a study that has landed takes more than one that has not).
MOST, GROWTH = 1024, 1.25
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


class Memory:
    """Samples, in a thread, the resident MiB of the services below a process.

    Attributes:
        samples: Seconds since the start, and MiB by service.
    """

    def __init__(self, root: int, every: float = 2.0):
        self.root, self.every = root, every
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._end.is_set():
            sizes: dict[str, float] = {}
            for line, mib in tree(self.root):
                for word, service in SERVICES.items():
                    if word in line:
                        sizes[service] = sizes.get(service, 0.0) + mib
                        break
            self.samples.append((time.monotonic() - self._began, sizes))
            self._end.wait(self.every)

    def rows(self, during: str) -> list[Row]:
        """A row for each service: whether its memory is bounded."""
        return [
            growth(f"memory of the {service}, {during}", self._of(service))
            for service in dict.fromkeys(SERVICES.values())
        ]

    def _of(self, service: str) -> list[tuple[float, float]]:
        return [(t, sizes[service]) for t, sizes in self.samples if service in sizes]


def growth(what: str, samples: list[tuple[float, float]]) -> Row:
    """Whether (seconds, MiB) stay within bounds; the first third is for warming up."""
    row, third = Row(what, recovered_by="nothing to recover: bounded"), len(samples) // 3
    if not third:
        row.count(f"only {len(samples)} samples of it")
        return row
    times, mib = zip(*samples, strict=True)
    middle, last = statistics.median(mib[third : 2 * third]), statistics.median(mib[2 * third :])
    slope = statistics.linear_regression(times[third:], mib[third:]).slope * 3600
    row.seen = (
        f"{mib[0]:.0f} MiB at first, {statistics.median(mib):.0f} in the median, {mib[-1]:.0f} in "
        f"the end, {max(mib):.0f} at most; {slope:+.0f} MiB an hour over the last two thirds of "
        f"{times[-1] / 60:.0f} min"
    )
    grew = last > GROWTH * middle or max(mib) > MOST
    row.count(f"{middle:.0f} MiB in the middle third, {last:.0f} in the last" if grew else None)
    return row


def tree(root: int) -> Iterator[tuple[str, float]]:
    """Command line and resident MiB of a process and of all that it started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(
                (folder / "stat").read_text().rpartition(")")[2].split()[1]
            )
        except OSError:  # it has ended
            continue
    ours = {root}
    while found := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= found
    for pid in ours:
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        yield line, pages * _PAGE_MIB
