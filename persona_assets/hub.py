"""Files from the Hugging Face hub, at a pinned commit only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path


class HubError(RuntimeError):
    """The hub, or what was asked of it, is not there; names repository, revision and remedy."""


def fetch(
    repo: str,
    revision: str,
    patterns: Sequence[str],
    target: Path,
    ignore: Sequence[str] = (),
) -> list[str]:
    """Put a repository's files that match ``patterns`` into ``target``.

    They pass through the hub client's cache, so that an interrupted download goes on where it
    stopped, and are linked from it where the file system allows.

    Args:
        repo: ``owner/name``.
        revision: The full commit hash.
        patterns: Globs over paths in the repository; ``*`` matches ``/`` too.
        ignore: Globs over paths that are left out.
        target: An existing folder.

    Returns:
        The files' paths below ``target``, sorted.

    Raises:
        HubError: the hub cannot be reached, the repository or commit is not there, or no file
            matches.
    """
    from httpx2 import HTTPError  # the client's own; its errors are these, or OSErrors
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import filter_repo_objects

    wanted = {"allow_patterns": list(patterns), "ignore_patterns": list(ignore)}
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, **wanted))
    except (HTTPError, OSError) as error:
        raise HubError(
            f"{repo} at {revision} cannot be fetched ({type(error).__name__}: {error}). "
            "Check the network, the repository's name and the commit."
        ) from error
    # The cached snapshot also holds what earlier calls fetched: only what matches is ours.
    cached = [str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()]
    files = sorted(filter_repo_objects(cached, **wanted))
    if not files:
        raise HubError(f"{repo} at {revision} has no file matching {', '.join(patterns)}.")
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy((snapshot / name).resolve(), target / name)
    return files


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
