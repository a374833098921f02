"""Where the checkpoints of an earlier experiment come from, whoever keeps them."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from persona_assets import hub
from persona_assets.hashing import sha256_file
from persona_assets.hub import HubFile
from persona_assets.store import write_atomically
from persona_assets.study_schema import HubRegistry
from persona_assets.training.checkpoints import (
    ADAPTER_FILES,
    MODEL_CONFIG,
    adapter_hash,
    check_checkpoint,
    checkpoint_hash,
)
from persona_assets.training.headers import (
    MAX_JSON,
    MODEL_INDEX,
    MODEL_WEIGHTS,
    CheckpointError,
    header_bytes,
    pickles,
    read_index,
)
from persona_assets.training.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS

#: How much of a file is asked for at first: most headers and configurations are in it.
_FIRST_BYTES = 100_000


class RegistryError(RuntimeError):
    """A checkpoint is missing, tampered with, or not the one asked for."""


class FolderRegistry:
    """A registry in a folder: ``<sha256>/`` holds an adapter, ``lock.json`` says whose it is.

    The lock file is generated: cell key → sha256, the files' hashes and sizes, and what the
    publisher added. Writers and readers in several processes take turns by a file lock.
    """

    def __init__(self, root: Path):
        self.root = root
        self.lock_file = root / "lock.json"

    def publish(
        self, cell_key: str, adapter_dir: Path, extra: Mapping[str, Any] | None = None
    ) -> str:
        """Add the adapter in ``adapter_dir`` under ``cell_key``; its SHA-256.

        Publishing again replaces the cell's entry; the folder named by the old hash stays.

        Raises:
            CheckpointError: a file of the adapter is missing.
            RegistryError: the lock file is damaged.
        """
        sha256 = adapter_hash(adapter_dir)
        files = {
            name: {
                "sha256": sha256_file(adapter_dir / name),
                "bytes": (adapter_dir / name).stat().st_size,
            }
            for name in ADAPTER_FILES
        }
        with self._exclusive():
            entries = self.entries()
            self._place(adapter_dir, sha256)
            entries[cell_key] = {"sha256": sha256, "files": files, "extra": dict(extra or {})}
            write_atomically(
                self.lock_file,
                json.dumps(entries, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
            )
        return sha256

    def fetch(self, cell_key: str, dest: Path, expected: str | None = None) -> str:
        """Copy the cell's adapter into ``dest``, made if missing; its verified SHA-256.

        Raises:
            RegistryError: it is missing or damaged, or its hash is not ``expected``.
        """
        if not self.root.is_dir():
            raise self._error(cell_key, "nothing was ever published here")
        with self._exclusive():
            entries = self.entries()
            if cell_key not in entries:
                raise self._error(cell_key, f"it is not among the {len(entries)} published cells")
            entry = entries[cell_key]
            if expected is not None and entry["sha256"] != expected:
                raise self._error(
                    cell_key, f"the lock file has {entry['sha256']}, asked for was {expected}"
                )
            folder = self.root / entry["sha256"]
            for name in ADAPTER_FILES:
                self._verify(cell_key, folder / name, entry["files"][name])
            if adapter_hash(folder) != entry["sha256"]:
                raise self._error(cell_key, f"{folder} holds another adapter than its name says")
            dest.mkdir(parents=True, exist_ok=True)
            for name in reversed(ADAPTER_FILES):  # the configuration last: it marks completion
                shutil.copyfile(folder / name, dest / name)
        return entry["sha256"]

    def entries(self) -> dict[str, dict[str, Any]]:
        """The lock file: what is published, by cell key; empty before anything is.

        Raises:
            RegistryError: the file is damaged.
        """
        try:
            entries = json.loads(self.lock_file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        if not isinstance(entries, dict):
            raise self._damaged("it holds no JSON object")
        for cell_key, entry in entries.items():
            if not _is_entry(entry):
                raise self._damaged(f"the entry of {cell_key} is not as published")
        return entries

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _place(self, adapter_dir: Path, sha256: str) -> None:
        """Bring the adapter into the folder of its name, whole or not at all."""
        draft = self.root / f".draft-{uuid.uuid4().hex}"
        try:
            draft.mkdir()
            for name in ADAPTER_FILES:
                shutil.copyfile(adapter_dir / name, draft / name)
            target, old = self.root / sha256, self.root / f".old-{uuid.uuid4().hex}"
            if target.exists():  # published before, perhaps damaged since
                target.rename(old)
            draft.rename(target)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _verify(self, cell_key: str, path: Path, entry: Mapping[str, Any]) -> None:
        if not path.is_file():
            raise self._error(cell_key, f"{path} is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise self._error(cell_key, f"{path} has {size} bytes, published {entry['bytes']}")
        if (found := sha256_file(path)) != entry["sha256"]:
            raise self._error(cell_key, f"{path} has sha256 {found}, published {entry['sha256']}")

    def _error(self, cell_key: str, what: str) -> RegistryError:
        return RegistryError(
            f"checkpoint of cell {cell_key} cannot be fetched from {self.root}: {what}. "
            "It is published again from the store when the checkpoint is materialized."
        )

    def _damaged(self, what: str) -> RegistryError:
        return RegistryError(
            f"{self.lock_file} is damaged ({what}). Delete it: what it lacks is published again "
            "from the store."
        )


class HubFolders:
    """Checkpoints in folders of a hub repository at a pinned commit, as a study file names them.

    A checkpoint is looked at before its weights are asked for, in kilobytes: a wrong one of 15 GB
    costs no more. Only its own safetensors files and configuration are ever fetched: nothing that
    unpickles, no code, and none of the training states that may lie beside it.
    """

    def __init__(self, source: HubRegistry):
        self.source = source
        self.commit = hub.Commit(source.repo, source.revision)

    def fetch(self, cell_key: str, dest: Path, base_folder: Path) -> str:
        """Download the cell's checkpoint into the folder ``dest``, verified; its SHA-256.

        Args:
            base_folder: The base model's, which the checkpoint must fit.

        Raises:
            RegistryError: the folder holds no checkpoint of the study's format, or one that does
                not fit the base; nothing but headers and configuration was fetched.
            HubError, HubUnavailable: as ``hub.Commit``'s methods.
        """
        where, seed = cell_key.rsplit(".", 1)
        source, arm = where.split(".")
        folder = self.source.folder.format(source=source, arm=arm, seed=seed)
        listed = self.commit.files_in(folder)
        with tempfile.TemporaryDirectory() as scratch:
            sketch = Path(scratch)
            try:
                names = self._draw(listed, sketch)
                check_checkpoint(sketch, base_folder, self.source.format)
            except CheckpointError as error:
                what = str(error).replace(f"{sketch}/", "").replace(str(sketch), "the folder")
                raise RegistryError(
                    f"checkpoint of cell {cell_key} in folder {folder} of {self.commit} is "
                    f"refused, and its weights are not downloaded: {what}."
                ) from None
        self.commit.download({name: listed[name] for name in names}, dest)
        return checkpoint_hash(dest)

    def _draw(self, listed: Mapping[str, HubFile], sketch: Path) -> list[str]:
        """Lay out the checkpoint without its weights; the names of its files.

        In the folder ``sketch``, the configuration is whole; of each file of weights there is the
        header, and then a hole as large as the tensors: to what reads headers and sizes it looks
        like the file itself.
        """

        def put(name: str) -> None:
            if name not in listed:
                raise CheckpointError(f"{name}: is missing: {self._instead(listed)}")
            file = listed[name]
            start = self.commit.first_bytes(file, _FIRST_BYTES)
            if name.endswith(".json"):
                whole = file.size if file.size <= MAX_JSON else 0  # refused by its size
            else:
                whole = min(header_bytes(start), file.size)
            if len(start) < whole:
                start = self.commit.first_bytes(file, whole)
            with (sketch / name).open("wb") as drawn:
                drawn.write(start)
                drawn.truncate(file.size)

        if self.source.format == "adapter":
            names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        elif MODEL_WEIGHTS in listed:
            names = [MODEL_CONFIG, MODEL_WEIGHTS]
        else:
            names = [MODEL_CONFIG, MODEL_INDEX]
        for name in names:
            put(name)
        if MODEL_INDEX in names:
            shards = sorted(read_index(sketch / MODEL_INDEX))
            for name in shards:
                put(name)
            names += shards
        return names

    def _instead(self, listed: Mapping[str, HubFile]) -> str:
        """What a folder holds that lacks a file of a checkpoint, and the remedy."""
        signs = {"adapter": ADAPTER_CONFIG, "merged": MODEL_CONFIG}
        own = signs.pop(self.source.format)
        ((other, sign),) = signs.items()
        if sign in listed and own not in listed:
            return f"the folder holds a checkpoint of format {other}: say so in the study file"
        if pickled := pickles(listed):
            return (
                f"the folder has pickled files ({', '.join(pickled)}), which are never loaded: pin "
                "a commit that has the checkpoint as safetensors"
            )
        names = ", ".join(sorted(listed)[:10]) or "no file"
        return f"the folder has {names}: pin a commit that has the whole checkpoint"


def _is_entry(entry: Any) -> bool:
    """Whether a lock entry names a hash and the adapter's files, and thus no path of its own."""
    return (
        isinstance(entry, dict)
        and _is_hash(entry.get("sha256"))
        and isinstance(entry.get("files"), dict)
        and set(entry["files"]) == set(ADAPTER_FILES)
        and all(
            isinstance(f, dict) and _is_hash(f.get("sha256")) and type(f.get("bytes")) is int
            for f in entry["files"].values()
        )
    )


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
