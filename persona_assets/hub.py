"""Files from the Hugging Face hub, at a pinned commit only."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

RepoType = Literal["model", "dataset"]


class HubError(RuntimeError):
    """The hub, or what was asked of it, is not there; names repository, revision and remedy."""


def fetch(
    repo: str,
    revision: str,
    patterns: Sequence[str],
    target: Path,
    ignore: Sequence[str] = (),
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
        ignore: Globs over paths that are left out.
        repo_type: Models and datasets have separate name spaces on the hub.

    Returns:
        The files' paths below ``target``, sorted.

    Raises:
        HubError: the hub cannot be reached or refuses access, the repository or commit is not
            there, no file matches, or HF_TOKEN is malformed.
    """
    from httpx2 import HTTPError  # the client's own; its errors are these, or OSErrors
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import filter_repo_objects

    where = f"{repo} at {revision}" if repo_type == "model" else f"{repo_type} {repo} at {revision}"
    wanted = {"allow_patterns": list(patterns), "ignore_patterns": list(ignore)}
    try:
        snapshot = Path(
            snapshot_download(
                repo, repo_type=repo_type, revision=revision, token=_token(), **wanted
            )
        )
    except (HTTPError, OSError, HFValidationError) as error:
        what, remedy = _diagnosis(error, repo_type)
        # The client's chain of three tracebacks says less than the sentence does.
        raise HubError(f"{where} cannot be fetched: {what}. {remedy}") from None
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


def _diagnosis(error: Exception, repo_type: RepoType) -> tuple[str, str]:
    """What the client's error comes down to, and the remedy."""
    from httpx2 import TransportError
    from huggingface_hub import constants, errors

    # The client looks into its cache before it gives up, and then reports the cache's lack.
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.RevisionNotFoundError():
            return "the repository has no such commit", "Pin the full hash of one of its commits."
        case errors.RepositoryNotFoundError() if not isinstance(error, errors.GatedRepoError):
            return (
                f"the hub shows no such {repo_type} repository (HTTP {status})",
                "Check its name; if it is private, set HF_TOKEN to a token that may read it.",
            )
        case errors.HfHubHTTPError() if status in (401, 403):
            return (
                f"the hub refuses access (HTTP {status})",
                "Accept the repository's terms on the hub, and set HF_TOKEN to a token that may "
                "read it.",
            )
        case errors.HfHubHTTPError():
            return f"the hub answered HTTP {status}", "Try again later."
        case errors.OfflineModeIsEnabled():
            return (
                "the cache lacks files of it and HF_HUB_OFFLINE forbids to download them",
                "Unset HF_HUB_OFFLINE, or point HF_HOME to a cache that has them.",
            )
        case TransportError():
            host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
            return (
                f"{host} cannot be reached ({_text(error)})",
                "Check the network, the proxy's settings and HF_ENDPOINT.",
            )
    return _text(error), "Check the repository's name, HF_ENDPOINT, and the folder HF_HOME."


def _token() -> str | bool:
    """The token to send; False for none, lest the client look for one elsewhere."""
    token = os.environ.get("HF_TOKEN", "").strip()
    # What cannot stand in a header would be quoted by the client's error.
    if not re.fullmatch(r"[!-~]*", token):
        raise HubError("HF_TOKEN holds a character that no token has. Set it to the token alone.")
    return token or False


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)
