"""Files from the Hugging Face hub, at a pinned commit only."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from persona_assets.hashing import sha256_file
from persona_assets.hub_client import HubError, HubUnavailable, RepoType, client_errors, token
from persona_assets.naming import nearest

if TYPE_CHECKING:
    from huggingface_hub import RepoFile, RepoFolder

_T = TypeVar("_T")

#: Disk that a download leaves free, in bytes: for what else is being written meanwhile.
_SPARE = 1 << 30
#: Files of a checkpoint that are downloaded at once.
_AT_ONCE = 4
#: No file of a hub is as large, in bytes.
_LARGEST = 1 << 43
#: Seconds to wait before a file is asked for again; what has arrived of the others is kept.
_PAUSES = (2.0, 8.0)


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository: its path there, its size in bytes, its SHA-256 where the hub tells.

    The hub tells it of the files in large-file storage, and so of all weights.
    """

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Commit:
    """A model repository at a commit: looked into by kilobytes, and downloaded file by file."""

    repo: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo} at {self.revision}"

    def files_in(self, folder: str) -> dict[str, HubFile]:
        """The files of a folder by plain name, without those of the folders in it.

        Raises:
            HubError: there is no such folder (the nearest one is named), or the hub lists a file
                that is not in it.
            HubUnavailable: the hub does not answer.
        """
        from huggingface_hub import RepoFile

        entries = self._tree(folder)
        if entries is None:
            raise HubError(f"{self} has no folder {folder}. {self._nearest(folder)}")
        files = {}
        for entry in entries:
            if isinstance(entry, RepoFile):
                parent, _, name = entry.path.rpartition("/")
                sized = type(entry.size) is int and 0 <= entry.size < _LARGEST
                if parent != folder or not _is_plain(name) or not sized:
                    raise HubError(
                        f"{self} lists {entry.path!r} of {entry.size} bytes as a file of {folder}. "
                        "Check HF_ENDPOINT: it answers as no hub does."
                    )
                files[name] = HubFile(entry.path, entry.size, entry.lfs and entry.lfs.sha256)
        return files

    def _nearest(self, folder: str) -> str:
        """Which folder there is instead, as a sentence."""
        from huggingface_hub import RepoFolder

        for parent in PurePosixPath(folder).parents:
            above = "" if parent == PurePosixPath() else str(parent)
            entries = self._tree(above)
            if entries is not None:
                known = [entry.path for entry in entries if isinstance(entry, RepoFolder)]
                where = f"Folder {above}" if above else "The repository"
                return f"{nearest(folder, known)}{where} has {len(known)} folders."
        return "The repository is empty."

    def _tree(self, folder: str) -> list[RepoFile | RepoFolder] | None:
        """What is in a folder; None if there is no such folder."""
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import RemoteEntryNotFoundError

        if constants.is_offline_mode():
            raise HubError(
                f"{self} cannot be looked into: HF_HUB_OFFLINE forbids it. Unset HF_HUB_OFFLINE "
                "until the checkpoints have landed; they need no network afterwards."
            )
        with client_errors(str(self)):
            try:
                listed = HfApi().list_repo_tree(
                    self.repo, folder or None, revision=self.revision, token=token()
                )
                return list(listed)
            except RemoteEntryNotFoundError:
                return None

    def first_bytes(self, file: HubFile, count: int) -> bytes:
        """The first ``count`` bytes of a file, or all of it if it has fewer; no more is read.

        Raises:
            HubError: the hub refuses it, or it ends before its listed size.
            HubUnavailable: the hub does not answer, also after a few tries.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        count = min(count, file.size)
        if count == 0:
            return b""
        url = hf_hub_url(self.repo, file.path, revision=self.revision)
        headers = build_hf_headers(
            token=token(),
            headers={"Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"},
        )

        def ask() -> bytes:
            content = bytearray()
            with (
                client_errors(f"{file.path} of {self}"),
                http_stream_backoff(
                    "GET",
                    url,
                    headers=headers,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                    retry_on_exceptions=(),
                    retry_on_status_codes=(),
                ) as response,
            ):
                hf_raise_for_status(response)
                # A server that ignores the range sends the whole file: stop reading in time.
                for chunk in response.iter_bytes(1 << 16):
                    content += chunk
                    if len(content) >= count:
                        return bytes(content[:count])
            raise HubError(
                f"{file.path} of {self} ended after {len(content)} of {file.size} bytes. Check "
                "HF_ENDPOINT: its listing says otherwise."
            )

        return _patiently(ask)

    def download(self, files: Mapping[str, HubFile], target: Path) -> None:
        """Put ``files`` into the folder ``target`` under the names that they are mapped from.

        They do not pass through the client's cache, where a second copy would stay. Each must
        have the size, and where the hub tells it the SHA-256, that the hub lists.

        Raises:
            HubError: the disk has no room, or a file is not what the hub lists.
            HubUnavailable: the hub does not answer, also after a few tries.
        """
        require_room(target, sum(file.size for file in files.values()))
        with (
            tempfile.TemporaryDirectory(dir=target, prefix=".download-") as scratch,
            ThreadPoolExecutor(_AT_ONCE) as pool,
        ):
            arrived = pool.map(lambda file: self._fetched(file, Path(scratch)), files.values())
            for name, path in zip(files, list(arrived), strict=True):  # all of them, or none
                path.rename(target / name)

    def _fetched(self, file: HubFile, scratch: Path) -> Path:
        """Where a file has arrived, verified."""
        from huggingface_hub import hf_hub_download

        def ask() -> Path:
            with client_errors(f"{file.path} of {self}"):
                return Path(
                    hf_hub_download(
                        self.repo,
                        file.path,
                        revision=self.revision,
                        token=token(),
                        local_dir=scratch,
                        cache_dir=scratch / "cache",  # empty: the file comes from the hub
                    )
                )

        path = _patiently(ask)
        size, sha256 = path.lstat().st_size, sha256_file(path)
        if size != file.size or sha256 != (file.sha256 or sha256):
            raise HubError(
                f"{file.path} of {self} arrived with {size} bytes and SHA-256 {sha256}, the hub "
                f"lists {file.size} bytes and SHA-256 {file.sha256}. It is not used: find out what "
                "stands between this machine and the hub."
            )
        return path


def require_room(folder: Path, needed: int) -> None:
    """See that the disk of ``folder`` has room for ``needed`` bytes, and something to spare.

    Raises:
        HubError: it has not; names the folder, and what is free and what is needed.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise HubError(
            f"the disk of {folder} has {free / 1e9:.1f} GB ({free} bytes) free, and "
            f"{needed / 1e9:.1f} GB ({needed} bytes) are to be downloaded, with "
            f"{_SPARE / 1e9:.1f} GB to spare. Free some, or let PERSONA_ASSETS_DATA name a folder "
            "on a larger disk."
        )


def fetch(
    repo: str,
    revision: str,
    patterns: Sequence[str],
    target: Path,
    repo_type: RepoType = "model",
) -> list[str]:
    """Put a repository's files that match ``patterns`` into ``target``.

    They pass through the hub client's cache, so that an interrupted download goes on where it
    stopped, and are linked from it where the file system allows. Without a network, or with
    HF_HUB_OFFLINE, what the cache holds of that commit is used. The client backs off and tries
    again five times (23 seconds in all) before it gives an unreachable or overloaded hub up.

    An access token is taken from HF_TOKEN and nowhere else: a run must not depend on who is
    logged in on the machine.

    Args:
        repo: ``owner/name``.
        revision: The full commit hash.
        patterns: Globs over paths in the repository; ``*`` matches ``/`` too.
        target: An existing folder.
        repo_type: Models and datasets have separate name spaces on the hub.

    Returns:
        The files' paths below ``target``, sorted.

    Raises:
        HubError: the hub refuses access, the repository or commit is not there, no file matches,
            or HF_TOKEN is malformed.
        HubUnavailable: the hub cannot be reached, or is overloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    where = f"{repo} at {revision}" if repo_type == "model" else f"{repo_type} {repo} at {revision}"
    wanted = {"allow_patterns": list(patterns)}
    with client_errors(where, repo_type):
        snapshot = Path(
            snapshot_download(repo, repo_type=repo_type, revision=revision, token=token(), **wanted)
        )
    # The cached snapshot also holds what earlier calls fetched: only what matches is ours.
    cached = [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]
    files = sorted(filter_repo_objects(cached, **wanted))
    if not files:
        raise HubError(
            f"{where} has no file matching {', '.join(patterns)}. Pin a commit that has."
        )
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy((snapshot / name).resolve(), target / name)
    return files


def _is_plain(name: str) -> bool:
    """Whether a file of this name stays in the folder that it is put into."""
    return re.fullmatch(r"[^/\\\x00-\x1f]+", name) is not None and name not in (".", "..")


def _patiently(ask: Callable[[], _T]) -> _T:
    """What ``ask`` returns, asked again after a pause while the hub is unavailable."""
    for pause in _PAUSES:
        try:
            return ask()
        except HubUnavailable:
            time.sleep(pause)
    return ask()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
