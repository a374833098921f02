"""The store: where partitions land, atomically, each with a manifest that is written last.

Layout under the root, one folder a partition::

    <study>/<asset>/<partition>/manifest.json         what has landed; replaced atomically
    <study>/<asset>/<partition>/<version>/<files>     immutable, named by the hash of its files

(An unpartitioned asset has no partition folder.) A partition counts as landed when its manifest
exists; files without one are debris of a killed run and are never read. A new version stands
beside the old one until the manifest moves over, so that nothing landed is ever overwritten. A
partition whose files are released keeps its manifest, and counts as landed without them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from stat import S_ISREG
from typing import Any

import polars as pl

from persona_assets.audit import Audit
from persona_assets.disk import refusal, require_writable
from persona_assets.hashing import sha256_file, sha256_json
from persona_assets.manifest import PLAIN, Manifest, Provenance, Ref

_DRAFT = ".draft-"
MANIFEST = "manifest.json"
#: What a killed process may leave in a partition's folder: drafts, a manifest not yet renamed, a
#: damaged version that was moved out of the way.
_DEBRIS = (f"{_DRAFT}*", ".manifest.*", ".old-*")


class StoreError(RuntimeError):
    """Something in the store is missing, damaged or cannot be written."""


class StoreUnreachable(StoreError):
    """The store itself cannot be asked: nothing is known of what has landed and what has not."""


class Store:
    """The landed partitions of one study, below ``root/<study>``.

    Reading never sees a half-written partition; writing goes through :meth:`land`.

    Attributes:
        at_once: How many partitions are worth asking for at once: each answer takes no while here.
    """

    at_once = 1

    def __init__(self, root: Path, study: str):
        self.root = root / study
        self.study = study

    def require_writable(self) -> None:
        """See that partitions can land, before anything is computed.

        Raises:
            DiskError: they cannot; names the path and what is needed.
        """
        require_writable(self.root)

    def folder(self, ref: Ref) -> Path:
        """The partition's folder, whether or not anything has landed in it.

        Raises:
            StoreError: asset or key is no plain name, and would lead out of the store.
        """
        parts = [ref.asset] if ref.key is None else [ref.asset, ref.key]
        if not all(PLAIN.fullmatch(part) for part in parts):
            raise StoreError(f"{str(ref)!r} is no partition: names have letters, digits and . - _")
        return self.root.joinpath(*parts)

    def manifest(self, ref: Ref) -> Manifest | None:
        """The partition's manifest, or None if it has not landed.

        Raises:
            StoreError: the manifest is damaged.
        """
        path, written = self._manifest_file(ref)
        if written is None:
            return None
        try:
            manifest = Manifest.from_json(written.decode())
            if manifest.ref != ref:
                raise ValueError(f"it is of {manifest.ref}")
            return manifest
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"{path} is damaged ({error!r}). Delete it and materialize {ref} again."
            ) from error

    def survey(self) -> Store:
        """The store to ask about very many partitions at once."""
        return self

    def _manifest_file(self, ref: Ref) -> tuple[Path | str, bytes | None]:
        """Where the manifest is or would be, and what stands there."""
        path = self.folder(ref) / MANIFEST
        try:
            return path, path.read_bytes()
        except FileNotFoundError:
            return path, None
        except OSError as error:
            raise StoreError(
                f"{path} cannot be read ({error}). Materialize {ref} again."
            ) from error

    def landed(self, ref: Ref) -> Manifest:
        """The partition's manifest.

        Raises:
            StoreError: it has not landed.
        """
        manifest = self.manifest(ref)
        if manifest is None:
            raise StoreError(
                f"{ref} of study {self.study} has not landed. Materialize {ref} first."
            )
        return manifest

    def damage(self, manifest: Manifest) -> str:
        """What is wrong with a landed partition's files at a glance: names and sizes only.

        Reading a file verifies its hash as well (:meth:`path`). Nothing is wrong with files that
        were released.
        """
        if manifest.released:
            return ""
        folder = self.folder(manifest.ref) / manifest.version
        for name, entry in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError:
                return f"{folder / name} is missing"
            if size != entry["bytes"]:
                return f"{folder / name} has {size} bytes, its manifest says {entry['bytes']}"
        return ""

    def verify(self, ref: Ref) -> str:
        """What is wrong with a partition, all of its files read; nothing if it has not landed."""
        try:
            manifest = self.manifest(ref)
            if manifest is not None and not manifest.released:
                self.directory(ref)
        except StoreError as error:
            return str(error)
        return ""

    def path(self, ref: Ref, name: str) -> Path:
        """The path of a landed file, verified against the manifest's size and hash.

        Raises:
            StoreError: the partition has not landed, or was released, or the file is missing or
                damaged.
        """
        manifest = self._readable(ref)
        self._bring(manifest, [name])
        return self.files_at(manifest) / name

    def directory(self, ref: Ref) -> Path:
        """The folder of all of a landed partition's files, each verified as in :meth:`path`."""
        manifest = self._readable(ref)
        self._bring(manifest, manifest.files)
        return self.files_at(manifest)

    def files_at(self, manifest: Manifest) -> Path:
        """The folder of a landed partition's files on this machine, not verified."""
        return self.folder(manifest.ref) / manifest.version

    def address(self, manifest: Manifest) -> str:
        """Where a landed partition's files are, for a person to find them."""
        return str(self.files_at(manifest))

    def _bring(self, manifest: Manifest, names: Iterable[str]) -> None:
        """See that files of a partition are on this machine, as they landed."""
        for name in names:
            verify_file(self.files_at(manifest) / name, manifest.files[name], manifest.ref)

    def _readable(self, ref: Ref) -> Manifest:
        """The manifest of a partition whose files are there."""
        manifest = self.landed(ref)
        if manifest.released:
            raise StoreError(
                f"the files of {ref} were removed after use, as study {self.study} says. "
                f"Materialize {ref} again."
            )
        return manifest

    def frame(self, ref: Ref, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """The partition's single Parquet file as a table."""
        (name,) = (name for name in self.landed(ref).files if name.endswith(".parquet"))
        return pl.read_parquet(self.path(ref, name), columns=list(columns) if columns else None)

    @contextmanager
    def turn(self, ref: Ref, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Be the only process that makes a partition; wait for the one that does.

        Ask what has landed inside of it. A turn ends with its process, however that ends, and what
        killed processes left of the partition is removed at the start of the next.

        Args:
            on_wait: Called before waiting, if there is somebody to wait for.

        Raises:
            StoreError: the partition's folder cannot be made or locked; names the path.
        """
        folder = self.folder(ref)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            what = refusal(error, folder) or error
            raise StoreError(f"{ref} cannot be made: {what}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise StoreError(
                    f"{ref} cannot be made: {folder} cannot be locked ({error})"
                ) from error
            for pattern in _DEBRIS:
                for left in folder.glob(pattern):
                    _remove(left)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child, an engine, has a copy of it
            os.close(lock)

    @contextmanager
    def draft(self, ref: Ref) -> Iterator[Path]:
        """A temporary folder to write a partition's files into, removed afterwards.

        :meth:`land` renames it into place; without that, nothing has happened. Only in the
        partition's :meth:`turn` is it safe from others.

        Raises:
            StoreError: the folder cannot be made, or the disk refused what was to be written into
                it, by whatever error; names path and remedy.
        """
        draft = self.folder(ref) / f"{_DRAFT}{uuid.uuid4().hex}"
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            what = refusal(error, draft) or error
            raise StoreError(f"{ref} cannot be made: {what}") from error
        try:
            yield draft
        except Exception as error:
            if (what := refusal(error, draft)) is None or isinstance(error, StoreError):
                raise
            raise StoreError(f"{ref} cannot be made: {what}") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def land(
        self,
        ref: Ref,
        draft: Path,
        *,
        provenance: Provenance,
        audits: Sequence[Audit] = (),
        summary: dict[str, Any] | None = None,
        data_version: str | None = None,
    ) -> Manifest:
        """Move a draft into place and let the manifest point at it.

        Args:
            ref: The partition.
            draft: The folder from :meth:`draft`, with at least one file in it.
            provenance: Which run made it, from what.
            audits: What the asset's checks found.
            summary: Values worth showing.
            data_version: Hash of the content where the files' bytes say more than the content
                (run ids); the hash of the files by default.
        """
        for path in draft.rglob("*"):
            if path.is_symlink():  # what it leads to could change, or be nobody's to publish
                raise StoreError(f"{path} is a symbolic link: put the file itself there for {ref}.")
        names = sorted(str(p.relative_to(draft)) for p in draft.rglob("*") if p.is_file())
        if not names:
            raise StoreError(f"nothing was written for {ref}.")
        files = {
            name: {
                "sha256": sha256_file(draft / name),
                "bytes": (draft / name).stat().st_size,
            }
            for name in names
        }
        version = sha256_json(files)[:16]
        target = self.folder(ref) / version
        for name in names:
            _fsync(draft / name)
        if target.exists() and not _whole(target, files):
            shutil.rmtree(_aside(target))
        try:
            os.rename(draft, target)
        except OSError as error:  # equal content has landed before, or did so just now
            if not _whole(target, files):
                raise StoreError(f"{target} cannot be written for {ref} ({error}).") from error
        manifest = Manifest(
            ref=ref,
            data_version=data_version or sha256_json(files),
            version=version,
            files=files,
            audits=tuple(audits),
            summary=summary or {},
            provenance=provenance,
            landed_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._declare(manifest)
        return manifest

    def _declare(self, manifest: Manifest) -> None:
        """Write the manifest of files that are in place: the partition has landed."""
        write_atomically(self.folder(manifest.ref) / MANIFEST, manifest.to_json())

    def release(self, ref: Ref) -> None:
        """Remove the files of a landed partition, of earlier versions too; the manifest stays.

        The manifest says so first: killed in between, the partition is released, and releasing it
        again removes what is left. In the partition's :meth:`turn`, as what makes it.

        Raises:
            StoreError: the partition has not landed, or its files cannot be removed.
        """
        manifest = self.landed(ref)
        if not manifest.released:
            try:
                self._declare(replace(manifest, released=True))
            except OSError as error:
                raise self._not_cleared(ref, error) from error
        self._clear(ref)

    def _clear(self, ref: Ref) -> None:
        """Remove all versions of a partition's files from this machine."""
        try:
            for version in self.folder(ref).iterdir():
                if version.is_dir() and not version.name.startswith(_DRAFT):
                    shutil.rmtree(version)
        except OSError as error:
            raise self._not_cleared(ref, error) from error

    def _not_cleared(self, ref: Ref, error: OSError) -> StoreError:
        return StoreError(f"{self.folder(ref)} cannot be cleared of released files ({error}).")


def _remove(left: Path) -> None:
    """Remove debris, a folder or a file, as far as that is allowed: it is in nobody's way."""
    if left.is_dir():
        shutil.rmtree(left, ignore_errors=True)
    else:
        with suppress(OSError):
            left.unlink()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path``, flush it to disk, rename it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _whole(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    """Whether a version that was written before still holds exactly these files."""
    return all(
        (folder / name).is_file() and sha256_file(folder / name) == entry["sha256"]
        for name, entry in files.items()
    )


def _aside(path: Path) -> Path:
    aside = path.with_name(f".old-{uuid.uuid4().hex}")
    os.rename(path, aside)
    return aside


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify_file(path: Path, entry: dict[str, Any], ref: Ref) -> None:
    """See that a file is as it landed; one that is not is set aside.

    Raises:
        StoreError: it is not; names the file and what is wrong.
    """
    try:
        stat = path.lstat()
    except OSError as error:
        raise StoreError(f"{path} is missing ({error}). Materialize {ref} again.") from error
    if not S_ISREG(stat.st_mode):
        raise StoreError(f"{path} is no file of its own. Delete it and materialize {ref} again.")
    if stat.st_size != entry["bytes"]:
        raise StoreError(
            f"{path} has {stat.st_size} bytes, its manifest says {entry['bytes']}. "
            f"Materialize {ref} again."
        )
    state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    try:
        found = _hash_once(path, *state)
    except OSError as error:
        raise StoreError(
            f"{path} cannot be read ({error}). Mend that, or delete it and materialize {ref} again."
        ) from error
    if found != entry["sha256"]:
        raise StoreError(
            f"{path} has SHA-256 {found}, its manifest says {entry['sha256']}. "
            f"{_set_aside(path, stat)} Materialize {ref} again."
        )


def _set_aside(path: Path, stat: os.stat_result) -> str:
    """Rename a damaged file, so that its partition counts as missing and is made again; in words.

    Unless it is no longer the one that was looked at: another process was first.
    """
    aside = path.with_name(f".damaged-{uuid.uuid4().hex}-{path.name}")
    try:
        if path.lstat().st_ino != stat.st_ino:
            return "Another process has mended it since."
        os.replace(path, aside)
    except FileNotFoundError:
        return "Another process has set it aside."
    except OSError as error:
        return f"It cannot be set aside ({error}): delete it."
    return f"It was set aside as {aside.name}."


@lru_cache(maxsize=4096)
def _hash_once(path: Path, *state: int) -> str:
    """The file's hash, computed once for each state of it that the file system tells apart.

    Of times, that of the inode's last change is one that no program sets.
    """
    return sha256_file(path)
