"""Rationales written by a chat model behind an OpenAI-compatible endpoint, at temperature 0.

Nothing is paid for twice: every paid reply, useful or not, is stored as soon as it has arrived, and
whoever pays holds the lock of the store. The only replies that can be lost are those in flight when
the process is killed, and those that a server finishes after ``timeout_seconds``.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TYPE_CHECKING, Any

from persona_assets.rationales.chat_prompts import messages, parse, read_reply
from persona_assets.rationales.replies import Replies, Reply, key_of
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

if TYPE_CHECKING:
    from openai import APIError, OpenAI

    from persona_assets.study_schema import ChatApiRationales

#: Requests between two looks at the budget; the store's lock is held for one batch at a time.
BATCH = 256
#: What a chat template adds to a request at most, in tokens.
_TEMPLATE_TOKENS = 64
#: Shorter "keys" are the placeholders of local servers, and words of the replies may hold them.
_MIN_SECRET_LENGTH = 8
_KEPT = "What was paid for is kept: run again to go on."

_log = logging.getLogger(__name__)
_Payload = dict[str, Any]


class ChatApiError(RuntimeError):
    """The endpoint could not be asked, or gave no answer; names it, what it said and the remedy."""


class BudgetExceeded(RuntimeError):
    """The next requests could cost more than is left; nothing of them was sent."""


class ChatApiWriter:
    """Asks a chat model for rationales, and pays for each of them once.

    Args:
        settings: The study's ``rationales`` section.
        replies: The paid replies of all studies.
        study: The study that pays: ``settings.budget_usd`` caps the sum of what it has ever paid.
    """

    def __init__(self, settings: ChatApiRationales, replies: Replies, study: str):
        self._settings, self._replies, self._study = settings, replies, study
        self._counts: Counter[str] = Counter()
        self._cost_usd = 0.0

    def write(self, requests: Sequence[RationaleRequest]) -> list[WrittenRationale]:
        """One reply a request, in order; equal requests are asked once, ever.

        The client retries 408, 409, 429, 5xx, time-outs and dropped connections, up to
        ``max_attempts`` in all: after the server's ``Retry-After`` where it names up to 120 s, else
        after 0.5 s, doubled each time up to 8 s, less a random quarter. After a request has failed
        for good no other is begun; those in flight are awaited and stored.

        Raises:
            ChatApiError: no API key, or a request failed for good.
            BudgetExceeded: the next batch could cost more than the budget leaves.
            RepliesError: the paid replies cannot be read or written.
        """
        payloads = [self._payload(request) for request in requests]
        keys = [key_of(payload) for payload in payloads]
        wanted = dict(zip(keys, payloads))
        self._counts["asked"] += len(wanted)
        found = self._look_up(wanted)
        missing = [(key, payload) for key, payload in wanted.items() if key not in found]
        if missing:
            with self._client() as client:
                for start in range(0, len(missing), BATCH):
                    found |= self._obtain(client, dict(missing[start : start + BATCH]))
        read = {key: read_reply(found[key].body) for key in wanted}
        self._counts.update(reply.problem for reply in read.values() if reply.problem)
        return [read[key] for key in keys]

    def vocabulary(self) -> frozenset[str]:
        """Empty: the model is told to write plain English, and the writer adds nothing to it."""
        return frozenset()

    @property
    def accounting(self) -> dict[str, Any]:
        """What was asked and paid since the writer was made.

        ``asked`` counts distinct requests, a call at a time, and is ``from_cache`` + ``paid`` where
        no call failed; ``retries``, tokens and ``cost_usd`` belong to the paid ones;
        ``refused``, ``truncated`` and ``malformed`` count among all that were asked.
        """
        names = ("asked", "from_cache", "paid", "retries", "prompt_tokens", "completion_tokens")
        problems = ("refused", "truncated", "malformed")
        counts = {name: self._counts[name] for name in (*names, *problems)}
        return {"model": self._settings.model, **counts, "cost_usd": self._cost_usd}

    def _payload(self, request: RationaleRequest) -> _Payload:
        return {
            "base_url": self._settings.base_url.rstrip("/"),
            "model": self._settings.model,
            "messages": messages(request),
            "temperature": 0,
            "max_tokens": self._settings.max_tokens,
        }

    def _look_up(self, keys: Iterable[str]) -> dict[str, Reply]:
        found = self._replies.get(keys)
        self._counts["from_cache"] += len(found)
        return found

    def _obtain(self, client: OpenAI, batch: Mapping[str, _Payload]) -> dict[str, Reply]:
        """The replies to a batch: what others have paid for meanwhile, and the rest paid for now.

        Under the lock from look-up to storing: two workers that want the same pay once.
        """
        with self._replies.locked():
            found = self._look_up(batch)
            unpaid = {key: payload for key, payload in batch.items() if key not in found}
            return found | self._pay(client, unpaid)

    def _pay(self, client: OpenAI, batch: Mapping[str, _Payload]) -> dict[str, Reply]:
        self._check_budget(batch.values())
        stop = Event()

        def ask(payload: _Payload) -> tuple[Reply, int] | None:
            if stop.is_set():
                return None
            try:
                return self._ask(client, payload)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self._settings.concurrency) as pool:
            futures = {key: pool.submit(ask, payload) for key, payload in batch.items()}
            try:
                wait(futures.values())
            finally:  # an interrupt, too, lets those in flight finish and begins no other
                stop.set()
        return self._settle(futures)

    def _settle(self, futures: Mapping[str, Future]) -> dict[str, Reply]:
        """Count what was paid, then raise the first failure if there was one."""
        answers = {key: f.result() for key, f in futures.items() if f.exception() is None}
        paid = {key: answer for key, answer in answers.items() if answer is not None}
        for reply, retries in paid.values():
            self._cost_usd += reply.cost_usd
            self._counts["paid"] += 1
            self._counts["retries"] += retries
            self._counts["prompt_tokens"] += reply.prompt_tokens or 0
            self._counts["completion_tokens"] += reply.completion_tokens or 0
        _log.info("%s: %d rationales paid for", self._settings.model, self._counts["paid"])
        for future in futures.values():
            if (error := future.exception()) is not None:
                raise error
        return {key: reply for key, (reply, _) in paid.items()}

    def _ask(self, client: OpenAI, payload: _Payload) -> tuple[Reply, int]:
        """The stored reply, and how many attempts had failed before it."""
        from openai import APIError

        arguments = {name: value for name, value in payload.items() if name != "base_url"}
        try:
            response = client.chat.completions.with_raw_response.create(**arguments)
        except APIError as error:
            failure = self._failure(error)
        else:
            body = self._redacted(response.content.decode("utf-8", "replace"))
            failure = self._no_completion(response.headers.get("content-type", ""), body)
        if failure is not None:  # raised out here, lest the client's error, with the server's
            raise failure  # unredacted words, go along as its context
        reply = self._priced(payload, body)
        self._replies.add(payload, reply, self._study)
        return reply, response.retries_taken

    def _priced(self, payload: _Payload, body: str) -> Reply:
        tokens = _usage(body)
        if tokens is None:
            return Reply(body, None, None, self._at_most_usd(payload))
        return Reply(body, *tokens, self._usd(*tokens))

    def _usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        s = self._settings
        millionths = prompt_tokens * s.usd_per_million_input_tokens
        return (millionths + completion_tokens * s.usd_per_million_output_tokens) / 1e6

    def _at_most_usd(self, payload: _Payload) -> float:
        """No tokenizer that falls back to bytes makes more than one token a byte."""
        written = sum(len(m["content"].encode("utf-8")) for m in payload["messages"])
        return self._usd(written + _TEMPLATE_TOKENS, payload["max_tokens"])

    def _check_budget(self, payloads: Iterable[_Payload]) -> None:
        estimates = [self._at_most_usd(payload) for payload in payloads]
        cap, estimate = self._settings.budget_usd, sum(estimates)
        spent = self._replies.spent_usd(self._study)
        if estimates and spent + estimate > cap:
            raise BudgetExceeded(
                f"rationales.budget_usd: study {self._study} has spent ${spent:.6f}, and the next "
                f"{len(estimates)} requests to {self._settings.model} could cost up to "
                f"${estimate:.6f}: more than the cap of ${cap:.6f}. Raise the cap to at least "
                f"${spent + estimate:.6f}, or lower rationales.max_tokens. {_KEPT}"
            )

    def _client(self) -> OpenAI:
        from openai import OpenAI

        return OpenAI(
            base_url=self._settings.base_url,
            # Without one the client would take OPENAI_API_KEY and hand it to whatever server.
            api_key=self._api_key() or "none",
            timeout=self._settings.timeout_seconds,
            max_retries=self._settings.max_attempts - 1,
        )

    def _api_key(self) -> str:
        variable = self._settings.api_key_env
        if variable is None:
            return ""
        key = os.environ.get(variable, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            fault = "holds characters that no HTTP header can" if key else "is not set"
            raise ChatApiError(
                f"{self._settings.base_url}: the environment variable {variable}, which "
                f"rationales.api_key_env names, {fault}. Set it to an API key of that endpoint, or "
                "write `api_key_env: null` if it asks for none. Nothing was sent"
            )
        return key

    def _redacted(self, text: str) -> str:
        key = self._api_key()
        return text.replace(key, "[API key]") if len(key) >= _MIN_SECRET_LENGTH else text

    def _failure(self, error: APIError) -> ChatApiError:
        """What the client gave up on, in words that may be logged."""
        from openai import APIStatusError, APITimeoutError

        tried = self._settings.max_attempts
        attempts = f"in {tried} attempt{'s' * (tried > 1)}"
        if isinstance(error, APIStatusError):
            status = error.status_code
            said = _shortened(self._redacted(error.response.text))
            return self._error(f"answered {status}: {said}", self._remedy(status))
        if isinstance(error, APITimeoutError):
            what = f"did not answer within {self._settings.timeout_seconds:g} s {attempts}"
            return self._error(what, "Raise rationales.timeout_seconds, or run again later.")
        what = f"cannot be reached {attempts} ({self._redacted(repr(error.__cause__))})"
        return self._error(what, "See rationales.base_url, and that the server runs.")

    def _no_completion(self, content_type: str, body: str) -> ChatApiError | None:
        """A 200 that nobody is charged for: a web page, or a gateway's report of an error."""
        value = parse(body)
        if content_type.startswith("text/html"):
            return self._error("answered with a web page", self._remedy(404))
        if isinstance(value, dict) and value.get("error") and not value.get("choices"):
            said = _shortened(body)
            return self._error(f"answered 200 with an error: {said}", self._remedy(500))
        return None

    def _error(self, what: str, remedy: str) -> ChatApiError:
        asked = f"{self._settings.base_url} (model {self._settings.model})"
        return ChatApiError(f"{asked} {what}. {remedy} {_KEPT}")

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


def _usage(body: str) -> tuple[int, int] | None:
    """Prompt and completion tokens as the endpoint counted them; None if it did not say."""
    value = parse(body)
    usage = value.get("usage") if isinstance(value, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if all(type(count) is int and 0 <= count < 2**31 for count in counts):
        return counts
    return None


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 400 else f"{text[:400]} …"
