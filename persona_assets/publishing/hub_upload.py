"""Files into a repository of the Hugging Face hub, in one commit, or none if they are there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from persona_assets.hashing import sha256_file
from persona_assets.hub_client import HubError, RepoType, client_errors, token
from persona_assets.naming import listed

if TYPE_CHECKING:
    from huggingface_hub import HfApi, RepoFile

#: The folder of a repository with the study's own definition, which says whose it is.
STUDY_FOLDER = "study/"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository that a study is uploaded to.

    Attributes:
        name: ``owner/name``.
        kind: Models and datasets have separate name spaces on the hub.
        private: Whether nobody else may read it.
        own: Pattern of the paths there that are the study's alone: what matches it and is no
            longer uploaded is removed. No other file of the repository is touched.
    """

    name: str
    kind: RepoType
    private: bool
    own: re.Pattern[str]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def page(self, commit: str) -> str:
        """The address of its files at a commit."""
        from huggingface_hub import constants

        hub = urlsplit(constants.ENDPOINT)
        host = hub.netloc.rpartition("@")[2]  # HF_ENDPOINT may hold a password
        kind = "datasets/" if self.kind == "dataset" else ""
        return f"{hub.scheme}://{host}/{kind}{self.name}/tree/{commit}"


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The commit that holds the files, and what it wrote and removed; nothing if it was there."""

    commit: str
    written: tuple[str, ...]
    removed: tuple[str, ...]


def require_token(repository: Repository) -> str:
    """The token to upload with, asked for before anything else is done.

    Raises:
        HubError: HF_TOKEN is not set or malformed, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        raise HubError(
            f"{repository} cannot be uploaded to: HF_HUB_OFFLINE forbids it. Unset it to publish."
        )
    found = token()
    if not isinstance(found, str):
        raise HubError(
            f"{repository} cannot be uploaded to: HF_TOKEN is not set, and nothing was sent. Set "
            "it to a token that may write to it."
        )
    return found


def upload(
    repository: Repository, files: Mapping[str, Path | bytes], message: str, description: str = ""
) -> Uploaded:
    """See that a repository's main branch holds ``files``; the commit that does.

    The repository is made if it is missing. What it holds is compared by hash, so that equal
    content makes no commit, and one file's change a commit of that file. Files go from where they
    are to the hub: no second copy is made here.

    Args:
        files: Content by path in the repository.
        message: The commit's.
        description: More of it.

    Raises:
        HubError: there is no token, or the hub refuses it; the repository holds another study, or
            is public and should not be; or it ignores a file. Nothing is committed.
        HubUnavailable: the hub does not answer, or somebody else commits just now.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=require_token(repository))
    with client_errors(str(repository), repository.kind, "write"):
        api.create_repo(
            repository.name,
            repo_type=repository.kind,
            private=repository.private,
            exist_ok=True,
        )
        head = api.repo_info(repository.name, repo_type=repository.kind, revision="main")
        there = _files(api, repository, head.sha)
    if repository.private and not head.private:
        raise HubError(
            f"{repository} is public on the hub, and publish.hub.private is true: nothing was "
            "uploaded. Make it private there, or say private: false in the study file."
        )
    others = [path for path in there if path.startswith(STUDY_FOLDER) and path not in files]
    if others:
        raise HubError(
            f"{repository} holds another study ({listed(others)}): nothing was uploaded. Name "
            "another repository under publish.hub, or remove that file there."
        )
    ours = any(path.startswith(STUDY_FOLDER) for path in there)
    in_the_way = [path for path in files if path in there and path != "README.md"]
    if not ours and in_the_way:
        raise HubError(
            f"{repository} has files of somebody else's in the way ({listed(in_the_way[:3])}): "
            "nothing was uploaded. Name another repository under publish.hub."
        )
    written = tuple(path for path in files if not _holds(there.get(path), files[path]))
    removed = tuple(path for path in there if path not in files and repository.own.fullmatch(path))
    if not written and not removed:
        return Uploaded(head.sha, (), ())
    with client_errors(str(repository), repository.kind, "write"):
        made = api.create_commit(
            repository.name,
            [
                *(CommitOperationAdd(path, files[path]) for path in written),
                *(CommitOperationDelete(path) for path in removed),
            ],
            commit_message=message,
            commit_description=description,
            repo_type=repository.kind,
            parent_commit=head.sha,  # else what was compared may be no longer what is there
        )
        there = _files(api, repository, made.oid)
    lacking = [path for path in files if not _holds(there.get(path), files[path])]
    if lacking:
        raise HubError(
            f"{repository} at {made.oid} lacks {listed(lacking[:3])} as it was sent. Look for a "
            ".gitignore in it that excludes that."
        )
    return Uploaded(made.oid, written, removed)


def _files(api: HfApi, repository: Repository, commit: str) -> dict[str, RepoFile]:
    """All files of the repository at a commit, by path."""
    from huggingface_hub import RepoFile

    entries = api.list_repo_tree(
        repository.name, recursive=True, revision=commit, repo_type=repository.kind
    )
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _holds(entry: RepoFile | None, content: Path | bytes) -> bool:
    """Whether a file of the repository is there and has that content.

    The hub tells the SHA-256 of a file in large-file storage, and of another one git's hash.
    """
    if entry is None:
        return False
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if entry.size != size:
        return False
    if entry.lfs is None:
        data = content if isinstance(content, bytes) else content.read_bytes()
        return entry.blob_id == hashlib.sha1(b"blob %d\0" % size + data).hexdigest()
    if isinstance(content, bytes):
        return entry.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return entry.lfs.sha256 == sha256_file(content)
