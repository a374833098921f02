"""What reading from the Hugging Face hub and writing to it share: the token, and plain errors."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from urllib.parse import urlsplit

from persona_assets.unavailable import Unavailable

RepoType = Literal["model", "dataset"]
Access = Literal["read", "write"]

#: What cannot be done where there is no such access, and what a token may do that has it.
_DONE = {"read": ("fetched", "read"), "write": ("uploaded to", "write to")}
#: Statuses that a hub answers when it is busy, or when somebody else was faster.
_MAY_PASS = frozenset({408, 409, 412, 425, 429})


class HubError(RuntimeError):
    """The hub, or what was asked of it, is not there; names repository, revision and remedy."""


class HubUnavailable(HubError, Unavailable):
    """The hub does not answer, or is overloaded: the same request may succeed later."""


@contextmanager
def client_errors(
    where: str, repo_type: RepoType = "model", access: Access = "read"
) -> Iterator[None]:
    """Say what the client's errors come down to.

    Raises:
        HubError, HubUnavailable: in place of the client's.
    """
    from httpx2 import HTTPError  # the client's own; its errors are these, or built-in ones

    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        what, remedy, may_pass = _diagnosis(error, repo_type, access)
        kind = HubUnavailable if may_pass else HubError
        # The client's chain of three tracebacks says less than the sentence does.
        raise kind(f"{where} cannot be {_DONE[access][0]}: {what}. {remedy}") from None


def _diagnosis(error: Exception, repo_type: RepoType, access: Access) -> tuple[str, str, bool]:
    """What the client's error comes down to, the remedy, and whether it may pass by itself."""
    from httpx2 import LocalProtocolError, TransportError, UnsupportedProtocol
    from huggingface_hub import constants, errors

    # The client looks into its cache before it gives up, and then reports the cache's lack; of an
    # upload it reports the file, and what became of it as the cause.
    if isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and error.__cause__:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    token_that_may = f"set HF_TOKEN to a token that may {_DONE[access][1]} it"
    terms = "Accept the repository's terms on the hub, and " if access == "read" else ""
    match error:
        case errors.RevisionNotFoundError():
            return (
                "the repository has no such commit",
                "Pin the full hash of one of its commits.",
                False,
            )
        case errors.RepositoryNotFoundError() if not isinstance(error, errors.GatedRepoError):
            return (
                f"the hub shows no such {repo_type} repository (HTTP {status})",
                f"Check its name; if it is private, {token_that_may}.",
                False,
            )
        case errors.HfHubHTTPError() if status in (401, 403):
            remedy = f"{terms}{token_that_may}."
            return f"the hub refuses access (HTTP {status})", remedy[0].upper() + remedy[1:], False
        case errors.HfHubHTTPError():
            may_pass = status in _MAY_PASS or status >= 500
            return f"the hub answered HTTP {status}", "Try again later.", may_pass
        case errors.OfflineModeIsEnabled():
            return (
                "the cache lacks files of it and HF_HUB_OFFLINE forbids to download them",
                "Unset HF_HUB_OFFLINE, or point HF_HOME to a cache that has them.",
                False,
            )
        case TransportError():
            host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
            return (
                f"{host} cannot be reached ({_text(error)})",
                "Check the network, the proxy's settings and HF_ENDPOINT.",
                not isinstance(error, LocalProtocolError | UnsupportedProtocol),
            )
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"the disk is full ({_text(error)})", "Free some space.", False
        case OSError() if str(error).startswith("Consistency check failed"):
            return "it arrived with another size than the hub lists", "Try again later.", True
        case RuntimeError():  # the hub's storage of chunks has a client of its own, with these
            return _text(error), "Try again later.", True
    return _text(error), "Check the repository's name, HF_ENDPOINT, and the folder HF_HOME.", False


def token() -> str | bool:
    """The token to send; False for none, lest the client look for one elsewhere.

    Raises:
        HubError: HF_TOKEN is malformed.
    """
    text = os.environ.get("HF_TOKEN", "").strip()
    # What cannot stand in a header would be quoted by the client's error.
    if not re.fullmatch(r"[!-~]*", text):
        raise HubError("HF_TOKEN holds a character that no token has. Set it to the token alone.")
    return text or False


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
