"""The store on object storage: S3, or whatever fsspec speaks to, shared by many machines.

The same folders and manifests as in :mod:`persona_assets.store`, as objects below a URL; what this
machine has written or read lies beside them in a local folder, the *mirror*, which may be removed
when no run is at work and no upload in it is pending. Files are uploaded before the manifest that
names them, and an upload of one object takes place whole or not at all: so here too a partition has
landed when its manifest is there.

Object storage has no locks. Processes on one machine take turns at a partition; two machines may
make the same one, and then the manifest that is written last holds, over files that are whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from persona_assets import environment
from persona_assets.disk import refusal, require_writable
from persona_assets.manifest import Manifest, Ref
from persona_assets.store import (
    MANIFEST,
    Store,
    StoreError,
    StoreUnreachable,
    verify_file,
    write_atomically,
)
from persona_assets.unavailable import Unavailable

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_T = TypeVar("_T")

#: What landed here and has not been uploaded yet, beside the files.
_PENDING = "manifest.pending.json"
_CHUNK = 1 << 22
_ARRIVING = ".arriving-"
#: Protocols whose objects are in buckets that must be there before.
_IN_BUCKETS = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs"})


class StoreUnavailable(StoreUnreachable, Unavailable):
    """The object store does not answer: the same request may succeed later."""


def open_store(study: str) -> Store:
    """The store of a study: where PERSONA_ASSETS_STORE says, else in the data folder.

    Raises:
        StoreError: the URL holds a password, or its protocol is not known or not installed.
    """
    url = environment.store_url()
    if url is None:
        return Store(environment.store_dir(), study)
    return ObjectStore(url, environment.store_dir(), study)


class ObjectStore(Store):
    """The landed partitions of one study, below ``url/<study>``.

    Args:
        url: Any URL of fsspec's whose file system writes an object whole or not at all.
        mirror: The local folder that objects are copied to and uploaded from.
    """

    at_once = 32

    def __init__(self, url: str, mirror: Path, study: str):
        super().__init__(mirror, study)
        self.url = url.rstrip("/")
        self._has_bucket = False
        if "::" in url:
            raise StoreError(
                f"{environment.STORE}: {self.url} puts one file system on another, which need not "
                "write an object whole or not at all. Name the object storage itself."
            )
        if "@" in urlsplit(url).netloc:
            raise StoreError(
                f"{environment.STORE} holds a user or password, which would end up in logs. Give "
                "credentials by the environment (AWS_ACCESS_KEY_ID and so on)."
            )

    @cached_property
    def _remote(self) -> tuple[AbstractFileSystem, str]:
        """The file system, and the study's folder in it."""
        from fsspec.core import url_to_fs

        try:
            # What another machine has landed since must be seen.
            system, root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreUnreachable(
                f"{environment.STORE}: {self.url} cannot be opened ({error}). For S3 install "
                "persona_assets[s3]."
            ) from error
        return system, posixpath.join(root, self.study)

    def _object(self, ref: Ref, *names: str) -> str:
        """The path of an object, or of the folder of a partition's objects."""
        return posixpath.join(self._remote[1], self._path(ref, *names))

    def _url(self, ref: Ref, *names: str) -> str:
        return posixpath.join(self.url, self.study, self._path(ref, *names))

    def _path(self, ref: Ref, *names: str) -> str:
        """The path below the study's folder."""
        return posixpath.join(*self.folder(ref).relative_to(self.root).parts, *names)

    def require_writable(self) -> None:
        """See that objects can be made, and the mirror be written.

        Raises:
            StoreError: objects cannot be made; names the URL.
            DiskError: the mirror cannot be written.
        """
        require_writable(self.root)
        system, root = self._remote
        probe = posixpath.join(root, f".probe-{os.getpid()}")
        with _told(f"{self.url}/{self.study}", "cannot be written"):
            self._require_bucket()
            system.pipe_file(probe, b"\0")
            system.rm_file(probe)

    def _manifest_file(self, ref: Ref) -> tuple[str, bytes | None]:
        url = self._url(ref, MANIFEST)
        with _told(url, "cannot be read"):
            try:
                # S3's client asks for an object's size first, if it may read it in pieces.
                content = self._remote[0].cat_file(self._object(ref, MANIFEST), max_concurrency=1)
                return url, content
            except FileNotFoundError:
                self._require_bucket()
                return url, None

    def _require_bucket(self) -> None:
        """Tell what is not there from a bucket that is not: that holds for all of the study.

        Raises:
            StoreUnreachable: there is no such bucket.
        """
        if self._has_bucket:
            return
        system, root = self._remote
        protocols = {system.protocol} if isinstance(system.protocol, str) else {*system.protocol}
        if protocols & _IN_BUCKETS and not system.exists(root.lstrip("/").partition("/")[0]):
            raise StoreUnreachable(
                f"{self.url} cannot be used: there is no such bucket. Make it, or mend "
                f"{environment.STORE}."
            )
        self._has_bucket = True

    def address(self, manifest: Manifest) -> str:
        return self._url(manifest.ref, manifest.version)

    def damage(self, manifest: Manifest) -> str:
        if manifest.released:
            return ""
        sizes = self._sizes(manifest)
        for name, entry in manifest.files.items():
            url = self._url(manifest.ref, manifest.version, name)
            if name not in sizes:
                return f"{url} is missing"
            if sizes[name] != entry["bytes"]:
                return f"{url} has {sizes[name]} bytes, its manifest says {entry['bytes']}"
        return ""

    def _sizes(self, manifest: Manifest) -> dict[str, int]:
        """The objects of a version by name, and how many bytes each has."""
        return self._below(self._object(manifest.ref, manifest.version), self.address(manifest))

    def _below(self, folder: str, url: str) -> dict[str, int]:
        """The objects in a folder and in those in it, by their paths there; bytes of each."""
        with _told(url, "cannot be listed"):
            try:
                found = self._remote[0].find(folder, detail=True)
            except FileNotFoundError:
                found = {}
            if not found:
                self._require_bucket()
        start = len(folder.lstrip("/")) + 1
        return {path.lstrip("/")[start:]: info["size"] for path, info in found.items()}

    def survey(self) -> Store:
        return _Surveyed(self)

    def verify(self, ref: Ref) -> str:
        """As in :meth:`Store.verify`: of the objects, whatever the mirror holds.

        Raises:
            StoreUnreachable: they cannot be read.
        """
        try:
            manifest = self.manifest(ref)
            if manifest is not None and not manifest.released:
                self._each(manifest, manifest.files, self._check_object)
        except StoreUnreachable:
            raise
        except StoreError as error:
            return str(error)
        return ""

    def _bring(self, manifest: Manifest, names: Iterable[str]) -> None:
        names = list(names)
        here = self._each(manifest, names, self._is_here)
        wanted = [name for name, is_here in zip(names, here) if not is_here]
        if not wanted:
            return
        try:
            with self._alone_in(manifest):
                self._each(manifest, wanted, self._mirrored)
        except OSError as error:
            what = refusal(error, self.files_at(manifest)) or error
            raise StoreError(f"{manifest.ref} cannot be copied here: {what}") from error

    @contextmanager
    def _alone_in(self, manifest: Manifest) -> Iterator[None]:
        """Be the only process that copies a version here; what a killed one left of it is removed.

        Raises:
            OSError: its folder in the mirror cannot be made, or not be locked.
        """
        folder = self.files_at(manifest)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in folder.rglob(f"{_ARRIVING}*"):
                left.unlink(missing_ok=True)
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child, an engine, has a copy of it
            os.close(lock)

    def _each(
        self, manifest: Manifest, names: Iterable[str], do: Callable[[Manifest, str], _T]
    ) -> list[_T]:
        names = list(names)
        with ThreadPoolExecutor(min(len(names), self.at_once) or 1) as pool:
            return list(pool.map(lambda name: do(manifest, name), names))

    def _is_here(self, manifest: Manifest, name: str) -> bool:
        """Whether a file is in the mirror as it landed; a damaged one is set aside."""
        try:
            verify_file(self.files_at(manifest) / name, manifest.files[name], manifest.ref)
        except StoreError:
            return False
        return True

    def _mirrored(self, manifest: Manifest, name: str) -> None:
        """Download a file to the mirror, unless it has come by now."""
        if self._is_here(manifest, name):
            return
        path = self.files_at(manifest) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        arriving = path.with_name(f"{_ARRIVING}{path.name}")
        found = hashlib.sha256()
        try:
            with arriving.open("wb") as file:
                for chunk in self._chunks(manifest, name):
                    found.update(chunk)
                    file.write(chunk)
            self._compare(manifest, name, found.hexdigest())
            os.replace(arriving, path)
        finally:
            arriving.unlink(missing_ok=True)

    def _check_object(self, manifest: Manifest, name: str) -> None:
        found = hashlib.sha256()
        for chunk in self._chunks(manifest, name):
            found.update(chunk)
        self._compare(manifest, name, found.hexdigest())

    def _chunks(self, manifest: Manifest, name: str) -> Iterator[bytes]:
        """The bytes of an object.

        Raises:
            StoreError: it is missing, or cannot be read.
        """
        url = self._url(manifest.ref, manifest.version, name)
        path = self._object(manifest.ref, manifest.version, name)
        with _told(url, "cannot be read"):
            try:
                with self._remote[0].open(path, "rb", block_size=_CHUNK) as remote:
                    while chunk := remote.read(_CHUNK):
                        yield chunk
            except FileNotFoundError as error:
                raise StoreError(f"{url} is missing. Materialize {manifest.ref} again.") from error

    def _compare(self, manifest: Manifest, name: str, found: str) -> None:
        """Set an object aside that is not as it landed: its partition counts as missing then.

        Raises:
            StoreError: it is not.
        """
        if found == manifest.files[name]["sha256"]:
            return
        url = self._url(manifest.ref, manifest.version, name)
        path = self._object(manifest.ref, manifest.version, name)
        aside = posixpath.join(posixpath.dirname(path), f".damaged-{found}")
        # Another machine may have been first.
        with _told(url, "cannot be set aside"), suppress(FileNotFoundError):
            self._remote[0].mv(path, aside)
        raise StoreError(
            f"{url} has SHA-256 {found}, its manifest says {manifest.files[name]['sha256']}. It "
            f"was set aside as .damaged-{found}. Materialize {manifest.ref} again."
        )

    @contextmanager
    def turn(self, ref: Ref, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """As in :meth:`Store.turn`, among the processes of this machine.

        What one of them landed here and could not upload is uploaded first.
        """
        with super().turn(ref, on_wait):
            self._catch_up(ref)
            yield

    def _catch_up(self, ref: Ref) -> None:
        pending = self.folder(ref) / _PENDING
        try:
            manifest = Manifest.from_json(pending.read_text("utf-8"))
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pending.unlink(missing_ok=True)  # as good as not landed
            return
        try:
            there = self.manifest(ref)
        except StoreUnreachable:
            raise
        except StoreError:  # damaged: as good as none
            there = None
        made = (manifest.version, manifest.provenance.run_id)
        older = there is None or there.landed_at <= manifest.landed_at
        if older and (there is None or (there.version, there.provenance.run_id) != made):
            try:
                self._upload(manifest)
            except StoreUnreachable:
                raise
            except StoreError:  # a file of it is damaged: it is made again
                pass
        pending.unlink()

    def _declare(self, manifest: Manifest) -> None:
        """Upload the files, and then the manifest; what cannot be uploaded now is not lost."""
        pending = self.folder(manifest.ref) / _PENDING
        write_atomically(pending, manifest.to_json())
        self._upload(manifest)
        pending.unlink()

    def _upload(self, manifest: Manifest) -> None:
        """Upload those files of a version that are not there yet, and then the manifest.

        Raises:
            StoreError: a file is not as it landed, or the object store refuses.
            StoreUnavailable: it does not answer.
        """
        there = self._sizes(manifest)

        def put(manifest: Manifest, name: str) -> None:
            path, entry = self.files_at(manifest) / name, manifest.files[name]
            verify_file(path, entry, manifest.ref)
            if there.get(name) != entry["bytes"]:
                with self._writing(self._url(manifest.ref, manifest.version, name)):
                    self._remote[0].put_file(
                        str(path), self._object(manifest.ref, manifest.version, name)
                    )

        self._each(manifest, manifest.files, put)
        self._put_manifest(manifest)

    def _put_manifest(self, manifest: Manifest) -> None:
        with self._writing(self._url(manifest.ref, MANIFEST)):
            content = manifest.to_json().encode()
            self._remote[0].pipe_file(self._object(manifest.ref, MANIFEST), content)

    @contextmanager
    def _writing(self, url: str) -> Iterator[None]:
        with _told(url, "cannot be written"):
            try:
                yield
            except FileNotFoundError as error:
                raise StoreUnreachable(f"{url} cannot be written ({error}).") from error

    def release(self, ref: Ref) -> None:
        manifest = self.landed(ref)
        if not manifest.released:
            self._put_manifest(replace(manifest, released=True))
        system, _ = self._remote
        with _told(self._url(ref), "cannot be cleared of released files"):
            # Of that version alone: another machine may be uploading the next one.
            if objects := system.find(self._object(ref, manifest.version)):
                with suppress(FileNotFoundError):
                    system.rm(objects)
        if self.folder(ref).is_dir():
            self._clear(ref)


class _Surveyed(ObjectStore):
    """An object store of which everything is known to be there, or not, by one listing of it."""

    def __init__(self, store: ObjectStore):
        super().__init__(store.url, store.root.parent, store.study)
        self._store = store
        folder = self._remote[1]
        self._bytes = self._below(folder, f"{self.url}/{self.study}")

    def _manifest_file(self, ref: Ref) -> tuple[str, bytes | None]:
        if self._path(ref, MANIFEST) not in self._bytes:
            return self._url(ref, MANIFEST), None
        return super()._manifest_file(ref)

    def damage(self, manifest: Manifest) -> str:
        """As of the listing; what has landed since is looked at by itself."""
        return super().damage(manifest) and self._store.damage(manifest)

    def _sizes(self, manifest: Manifest) -> dict[str, int]:
        paths = {name: self._path(manifest.ref, manifest.version, name) for name in manifest.files}
        return {name: self._bytes[path] for name, path in paths.items() if path in self._bytes}


@contextmanager
def _told(url: str, what: str) -> Iterator[None]:
    """Say what a file system's errors come down to; one that something is missing passes.

    Raises:
        StoreUnreachable, StoreUnavailable: in place of the file system's.
    """
    try:
        yield
    except (FileNotFoundError, StoreError):  # what is not there is the caller's to judge
        raise
    except PermissionError as error:
        raise StoreUnreachable(
            f"{url} {what}: access is refused ({error}). Check the credentials in the environment, "
            "and what they allow."
        ) from error
    except Exception as error:  # each client of fsspec's has errors of its own
        kind = f"{type(error).__module__}.{type(error).__name__}"
        if "Credentials" in kind or "ParamValidation" in kind:
            raise StoreUnreachable(
                f"{url} {what}: {error}. Mend that in the environment."
            ) from error
        raise StoreUnavailable(
            f"{url} {what}: {type(error).__name__}: {error}. Check the network and the endpoint "
            "(AWS_ENDPOINT_URL)."
        ) from error
