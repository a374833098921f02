"""One request to an OpenAI-compatible endpoint: sent once, with a deadline over the whole of it."""

from __future__ import annotations

import asyncio
import os
import random
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import httpx2

from persona_assets.rationales.chat_prompts import is_completion
from persona_assets.unavailable import Unavailable

if TYPE_CHECKING:
    from persona_assets.study_schema import ChatApiRationales

#: Longer waits than this that a server asks for are a failure for good.
_LONGEST_WAIT_SECONDS = 120.0
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.5, 8.0
#: Shorter "keys" are the placeholders of local servers, and words of the replies may hold them.
_MIN_SECRET_LENGTH = 8

#: Bytes of a reply at the most, once they are unpacked.
_LARGEST_REPLY = 4_000_000

#: What became of a request that reached the endpoint and whose reply did not come back.
Loss = Literal["timed_out", "dropped"]


class ChatApiError(RuntimeError):
    """The endpoint could not be asked, or gave no answer; names it, what it said and the remedy.

    Attributes:
        wait_seconds: How long to wait before asking again; 0 leaves it to the asker, None means
            that asking again is no use.
        loss: Set if the endpoint may charge for the request although no reply came back.
    """

    def __init__(self, message: str, wait_seconds: float | None = None, loss: Loss | None = None):
        super().__init__(message)
        self.wait_seconds, self.loss = wait_seconds, loss


class ChatApiUnavailable(ChatApiError, Unavailable):
    """Asking again may help, and the endpoint charges for nothing that it did not deliver."""


def back_off(attempt: int) -> float:
    """Seconds to wait after ``attempt`` (from 1): 0.5 doubled up to 8, less a random quarter."""
    longest = min(_FIRST_WAIT_SECONDS * 2.0 ** min(attempt - 1, 9), _LAST_WAIT_SECONDS)
    return longest * random.uniform(0.75, 1)


class ChatClient:
    """Sends requests to the endpoint of a study's ``rationales`` section; an async context.

    Raises:
        ChatApiError: the API key is missing; nothing was sent.
    """

    def __init__(self, settings: ChatApiRationales):
        self._settings = settings
        self._key = _api_key(settings)
        self._http = httpx2.AsyncClient(
            base_url=settings.base_url,
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            # The deadline is ours. A connection gets half of it, so that its failure, which costs
            # nothing, is not taken for a reply that never came.
            timeout=httpx2.Timeout(None, connect=settings.timeout_seconds / 2),
            limits=httpx2.Limits(max_connections=settings.concurrency),
            follow_redirects=True,
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        await self._http.__aexit__(kind, error, where)

    async def send(self, request: dict[str, Any]) -> str:
        """The body of the completion that answers ``request``, without the API key.

        From connecting to the last byte it takes ``timeout_seconds`` at most.

        Raises:
            ChatApiError: no completion came back.
        """
        seconds, sent = self._settings.timeout_seconds, asyncio.Event()

        async def trace(event: str, _: dict[str, Any]) -> None:
            if event.endswith("send_request_headers.started"):
                sent.set()

        try:
            async with (
                asyncio.timeout(seconds),
                self._http.stream(
                    "POST", "chat/completions", json=request, extensions={"trace": trace}
                ) as response,
            ):
                content = bytearray()
                async for chunk in response.aiter_bytes(1 << 16):
                    content += chunk
                    if len(content) > _LARGEST_REPLY:
                        break
        except TimeoutError:
            failure = self._timed_out(sent.is_set())
        except (httpx2.HTTPError, OSError) as error:
            failure = self._dropped(error) if sent.is_set() else self._unreachable(error)
        else:
            body = self._redacted(content.decode("utf-8", "replace"))
            if len(content) > _LARGEST_REPLY:
                failure = self._endless()
            elif response.status_code == 200 and is_completion(body):
                return body
            else:
                failure = self._no_completion(response, body)
        raise failure  # out here, lest the library's error, with the key, go along as its context

    def _timed_out(self, sent: bool) -> ChatApiError:
        """Asked again, it would time out again, and be charged for again."""
        seconds = f"{self._settings.timeout_seconds:g} s"
        remedy = f"Raise rationales.timeout_seconds (now {seconds}), or lower rationales.max_tokens"
        if not sent:
            return self._error(f"cannot be reached within {seconds}.", f"{remedy}.", wait=0.0)
        return self._error(
            f"did not answer within {seconds}.",
            f"{remedy}: it may charge for what it did not deliver, and the budget is charged with "
            "the most that it can have cost.",
            loss="timed_out",
        )

    def _endless(self) -> ChatApiError:
        what = f"answered with more than {_LARGEST_REPLY} bytes, which is no rationale."
        remedy = "The budget is charged with the most that can have cost. See rationales.base_url."
        return self._error(what, remedy, loss="dropped")

    def _dropped(self, error: Exception) -> ChatApiError:
        what = f"hung up before it had answered ({self._redacted(repr(error))})."
        remedy = "The budget is charged with the most that can have cost. See that the server runs."
        return self._error(what, remedy, wait=0.0, loss="dropped")

    def _unreachable(self, error: Exception) -> ChatApiError:
        what = f"cannot be reached ({self._redacted(repr(error))})."
        return self._error(what, "See rationales.base_url, and that the server runs.", wait=0.0)

    def _no_completion(self, response: httpx2.Response, body: str) -> ChatApiError:
        """An error, or a 200 that nobody is charged for: a web page, a gateway's own words."""
        status, said = response.status_code, _shortened(body)
        if status != 200:
            return self._error(f"answered {status}: {said}.", self._remedy(status), _wait(response))
        if response.headers.get("content-type", "").startswith("text/html"):
            return self._error("answered with a web page.", self._remedy(404))
        what = f"answered 200 without a completion: {said or 'nothing'}."
        return self._error(what, self._remedy(500), wait=0.0)

    def _error(
        self, what: str, remedy: str, wait: float | None = None, loss: Loss | None = None
    ) -> ChatApiError:
        asked = f"{self._settings.base_url} (model {self._settings.model})"
        kept = "What was paid for is kept: run again to go on."
        kind = ChatApiError if wait is None or loss else ChatApiUnavailable
        return kind(f"{asked} {what} {remedy} {kept}", wait, loss)

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            variable = self._settings.api_key_env
            if variable is None:
                return "Name the variable that holds an API key in rationales.api_key_env."
            return f"Set the environment variable {variable} to a key that may use this model."
        if status == 404:
            return "See rationales.base_url (most end in /v1) and rationales.model."
        if status == 429:
            return "See the account's quota, or lower rationales.concurrency."
        if status < 500:
            return "The endpoint takes no such request: see rationales.model and max_tokens."
        return "See the service's state, and run again later."

    def _redacted(self, text: str) -> str:
        long = len(self._key) >= _MIN_SECRET_LENGTH
        return text.replace(self._key, "[API key]") if long else text


def _api_key(settings: ChatApiRationales) -> str:
    variable = settings.api_key_env
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        fault = "holds characters that no HTTP header can" if key else "is not set"
        raise ChatApiError(
            f"{settings.base_url}: the environment variable {variable}, which "
            f"rationales.api_key_env names, {fault}. Set it to an API key of that endpoint, or "
            "write `api_key_env: null` if it asks for none. Nothing was sent"
        )
    return key


def _wait(response: httpx2.Response) -> float | None:
    """``ChatApiError.wait_seconds`` after an error status."""
    if response.status_code not in (408, 409, 429) and response.status_code < 500:
        return None
    if response.headers.get("x-should-retry") == "false":
        return None
    for header, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(response.headers[header]) * unit
        except (KeyError, ValueError):  # a date, too: the usual wait does
            continue
        if seconds > _LONGEST_WAIT_SECONDS:
            return None
        if seconds > 0:
            return seconds
    return 0.0


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} …"
