"""Feeds bad input to everything that reads any, and counts what it makes of it.

Whatever is read or refused with the documented error passes. Counted as faults: any other
exception, an input that takes longer than :data:`SECONDS`, a process that dies, a path that leaves
the store, a file written or read through SQL.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from persona_assets_tests.reliability.readers import READERS, Escape, Use
from persona_assets_tests.reliability.table import Row

#: An input that takes longer than this hangs.
SECONDS = 20.0
#: Inputs that one process is given at a time.
_CHUNK = 10_000


class Hang(BaseException):
    """An input took too long. No reader can take it for an error of its own."""


@dataclass
class Tally:
    """What became of a reader's inputs; ``faults`` holds the first few, in words."""

    taken: int = 0
    refused: int = 0
    n_faults: int = 0
    slowest: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return self.taken + self.refused + self.n_faults

    def add(self, other: Tally) -> None:
        self.taken += other.taken
        self.refused += other.refused
        self.n_faults += other.n_faults
        self.slowest = max(self.slowest, other.slowest)
        self.faults = [*self.faults, *other.faults][:5]


def fuzz(name: str, n: int, seed: int) -> Tally:
    """Give a reader ``n`` inputs, the same ones for the same seed."""
    tally, rng = Tally(), random.Random(f"{name}/{seed}")
    previous = signal.signal(signal.SIGALRM, _too_long)
    try:
        with tempfile.TemporaryDirectory() as folder, READERS[name].opened(Path(folder)) as use:
            for _ in range(n):
                _one(use, rng, tally, f"seed {seed}")
    except Escape as error:
        tally.n_faults += 1
        tally.faults.append(str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return tally


def _in_a_process(job: tuple[str, int, int]) -> Tally:
    """:func:`fuzz` in a process of its own, whose death is a fault too."""
    with ProcessPoolExecutor(1) as pool:
        try:
            return pool.submit(fuzz, *job).result()
        except BrokenProcessPool:
            return Tally(n_faults=1, faults=[f"seed {job[2]}: the process died"])


def _one(use: Use, rng: random.Random, tally: Tally, where: str) -> None:
    state = random.Random(rng.getrandbits(64))
    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        taken = use(state)
    except (Exception, Hang) as error:  # the fault that is looked for
        tally.n_faults += 1
        said = f"{type(error).__name__}: {error}"
        tally.faults = [*tally.faults, f"{where}, input {tally.tried - 1}: {said[:300]}"][:5]
    else:
        tally.taken += taken
        tally.refused += not taken
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    tally.slowest = max(tally.slowest, time.monotonic() - began)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Hang(f"longer than {SECONDS:g} s")


def fuzz_all(n: int, seed: int, processes: int = 2) -> dict[str, Tally]:
    """Give all readers together ``n`` inputs, each its share; by reader."""
    total = sum(reader.share for reader in READERS.values())
    jobs = []
    for name, reader in READERS.items():
        left = -(-n * reader.share // total)
        for chunk, start in enumerate(range(0, left, _CHUNK)):
            jobs.append((name, min(_CHUNK, left - start), seed * 100_000 + chunk))
    tallies = {name: Tally() for name in READERS}
    with ThreadPoolExecutor(processes) as threads:
        for (name, *_), tally in zip(jobs, threads.map(_in_a_process, jobs), strict=True):
            tallies[name].add(tally)
    return tallies


def rows(folder: Path, seed: int, n: int = 1_000_000) -> list[Row]:
    """A row a reader; ``folder`` is not used: each process has its own."""
    return [
        Row(
            f"bad input: {READERS[name].what}",
            tally.tried,
            tally.n_faults,
            "nothing to recover: read or refused with the documented error",
            f"{tally.taken} read, {tally.refused} refused, the slowest in {tally.slowest:.1f} s",
            tally.faults,
        )
        for name, tally in fuzz_all(n, seed).items()
    ]
