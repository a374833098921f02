"""Where things are: one data folder, one Dagster home, both absolute, both from the environment.

Relative paths in ``dagster.yaml`` resolve against the current folder, not against DAGSTER_HOME:
started from elsewhere, a second, empty database would open silently. So every path is made
absolute here, before Dagster reads any.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from urllib.parse import quote

from persona_assets.disk import require_writable
from persona_assets.hashing import sha256_text

_PROJECT = Path(__file__).resolve().parents[1]

#: Folder of studies, store, registry and Dagster's own storage.
DATA = "PERSONA_ASSETS_DATA"
#: Folder of Dagster's databases and compute logs; ``dagster.yaml`` refers to it.
DAGSTER_STORAGE = "PERSONA_ASSETS_DAGSTER"
#: Where Dagster's database is if that is Postgres, by the names that Postgres's own programs read;
#: ``deploy/*/dagster.yaml`` refer to them.
POSTGRES = ("PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGDATABASE")
#: A local folder with the ARC-Challenge JSONL files, read instead of the hub.
ARC_DIR = "PERSONA_ASSETS_ARC_DIR"
#: A local tokenizer folder, read instead of the base model's on the hub.
TOKENIZER_DIR = "PERSONA_ASSETS_TOKENIZER_DIR"

#: A local folder with the result tables of earlier experiments.
PRIOR_DIR = "PERSONA_ASSETS_PRIOR_DIR"

#: Where the stores of all studies are: a folder, or a URL of object storage.
STORE = "PERSONA_ASSETS_STORE"

#: Where links into Dagster's web interface lead, for readers on another machine.
UI = "PERSONA_ASSETS_UI"

#: Where the engine server of `persona-assets serve` is.
ENGINE = "PERSONA_ASSETS_ENGINE"

#: Run tag: the process of ``persona-assets run`` that makes it, as :func:`process_name` has it.
WORKER_TAG = "persona_assets/worker"
#: Run tag: the process that makes it, where somebody has started that by hand.
PROCESS_TAG = "persona_assets/process"

#: The files that stand for a split in :data:`ARC_DIR`, train first.
ARC_FILES = ("ARC-Challenge-Train.jsonl", "ARC-Challenge-Test.jsonl")
#: The files of a tokenizer, there and on the hub.
TOKENIZER_FILES = ("tokenizer*", "vocab.json", "merges.txt", "chat_template*", "special_tokens*")


class FolderMissing(FileNotFoundError):
    """A folder that an environment variable names is not there."""


def prepare() -> None:
    """Set the variables that are not set, and make the set ones absolute.

    Raises:
        DiskError: there is no folder for Dagster's databases, and it cannot be made.
    """
    data = Path(os.environ.get(DATA) or _PROJECT / "data").resolve()
    storage = Path(os.environ.get(DAGSTER_STORAGE) or data / "dagster").resolve()
    home = Path(os.environ.get("DAGSTER_HOME") or _PROJECT).resolve()
    if not storage.is_dir():
        require_writable(storage)
    if os.environ.get(STORE) and store_url() is None:
        os.environ[STORE] = str(store_dir())
    os.environ |= {DATA: str(data), DAGSTER_STORAGE: str(storage), "DAGSTER_HOME": str(home)}


def data_dir() -> Path:
    """The data folder, absolute."""
    return Path(os.environ.get(DATA) or _PROJECT / "data").resolve()


def study_file(name: str) -> Path:
    """The study file of that name."""
    return data_dir() / "studies" / f"{name}.yaml"


def study_names() -> list[str]:
    """The studies that the data folder has files for, sorted."""
    return sorted(path.stem for path in (data_dir() / "studies").glob("*.yaml"))


def store_url() -> str | None:
    """The URL that PERSONA_ASSETS_STORE names, or None where the store is in a folder."""
    value = os.environ.get(STORE, "")
    return value if "://" in value and not value.startswith("file://") else None


def store_dir() -> Path:
    """The folder of the stores of all studies; of a store on object storage, of its copies here."""
    if url := store_url():
        return data_dir() / "mirror" / sha256_text(url)[:16]
    place = os.environ.get(STORE, "").removeprefix("file://")
    return Path(place).resolve() if place else data_dir() / "store"


def publish_dir() -> Path:
    """Markers of what is published, and of what still is to be, of all studies."""
    return data_dir() / "publish"


def prior_table(name: str) -> Path:
    """The result table of that name of an earlier experiment."""
    return (local_folder(PRIOR_DIR) or data_dir() / "prior") / name


def replies_file() -> Path:
    """The cache of what rationale-writing services have been paid for, of all studies."""
    return data_dir() / "replies.sqlite"


def local_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, or None if it is unset.

    Raises:
        FolderMissing: it is set and no folder; names variable and path.
    """
    value = os.environ.get(variable)
    if not value:
        return None
    path = Path(value).resolve()
    if not path.is_dir():
        raise FolderMissing(f"{variable} names {path}, which is no folder. Mend or unset it.")
    return path


def partition_page(study: str, asset: str, key: str | None = None, base: str | None = None) -> str:
    """The address of a partition's page in Dagster's web interface.

    Args:
        base: Where the interface is; what PERSONA_ASSETS_UI says by default, else where `make ui`
            starts it. Empty for a link from one of its own pages.
    """
    if base is None:
        base = os.environ.get(UI) or "http://127.0.0.1:3000"
    page = f"{base.rstrip('/')}/assets/{study}/{asset}"
    return page if key is None else f"{page}?view=partitions&partition={quote(key)}"


def engine_url() -> str:
    """The address of the engine server: what PERSONA_ASSETS_ENGINE says, else the default."""
    return os.environ.get(ENGINE) or "http://127.0.0.1:3001"


def process_name(pid: int | None = None) -> str:
    """What a process of this machine, this one by default, is called in a run's tags.

    With the machine, since Dagster's database may be that of several.
    """
    return f"{os.getpid() if pid is None else pid}@{platform.node()}"


def is_of_this_machine(name: str) -> bool:
    """Whether a :func:`process_name` is of this machine; one without any is, from earlier times."""
    _, at, machine = name.partition("@")
    return not at or machine == platform.node()


def processors() -> int:
    """The processors that this process may use, which may be fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
