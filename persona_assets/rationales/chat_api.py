"""Rationales written by a chat model behind an OpenAI-compatible endpoint, at temperature 0.

Nothing is paid for twice: every paid reply, useful or not, is stored as soon as it has arrived, and
whoever pays holds the lock of the store. Nothing is paid for unseen: each request is booked in the
store, at the most that it can cost, before it is sent. What the endpoint may have charged for
without delivering it (a time-out, a dropped connection, a killed process) stays booked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

from persona_assets.rationales.chat_client import ChatApiError, ChatClient, back_off
from persona_assets.rationales.chat_prompts import messages, parse, read_reply
from persona_assets.rationales.replies import Replies, Reply, key_of
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale

if TYPE_CHECKING:
    from persona_assets.study_schema import ChatApiRationales

#: The store's lock is held for so many requests at a time.
BATCH = 256
#: What a chat template adds to a request at most, in tokens.
_TEMPLATE_TOKENS = 64
#: How soon a wait ends after an interrupt.
_TICK_SECONDS = 0.1

_log = logging.getLogger(__name__)
_Payload = dict[str, Any]


class BudgetExceeded(RuntimeError):
    """The next requests could cost more than is left; none of them was sent."""


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

        Sent again, up to ``max_attempts`` in all: what was answered with 408, 409, 429, 5xx or a
        200 that holds no completion, and what met a dropped connection; after the server's
        ``Retry-After`` where it names up to 120 s, else after 0.5 s, doubled each time up to 8 s,
        less a random quarter. A request that was not answered within ``timeout_seconds``, counted
        over the whole of it, is not sent again. After a failure for good, or an interrupt, no
        other is sent; those in flight are awaited and stored.

        Before a batch and before each request of it, the most that it can cost is held against
        what the budget leaves. An endpoint that counts more tokens than it was asked for can
        exceed the budget by that excess in the requests in flight, and in no more.

        Raises:
            ChatApiError: no API key, or a request failed for good.
            BudgetExceeded: the next requests could cost more than the budget leaves.
            RepliesError: the paid replies cannot be read or written.
        """
        payloads = [self._payload(request) for request in requests]
        keys = [key_of(payload) for payload in payloads]
        wanted = dict(zip(keys, payloads))
        self._counts["asked"] += len(wanted)
        found = self._look_up(wanted)
        missing = [(key, payload) for key, payload in wanted.items() if key not in found]
        for start in range(0, len(missing), BATCH):
            found |= self._obtain(dict(missing[start : start + BATCH]))
        letters = {key: request.argues_for for key, request in zip(keys, requests)}
        read = {key: read_reply(found[key].body, letters[key]) for key in wanted}
        self._counts.update(reply.problem for reply in read.values() if reply.problem)
        return [read[key] for key in keys]

    def vocabulary(self) -> frozenset[str]:
        """Empty: the model is told to write plain English, and the writer adds nothing to it."""
        return frozenset()

    @property
    def accounting(self) -> dict[str, Any]:
        """What was asked and paid since the writer was made.

        ``asked`` counts distinct requests, a call at a time, and is ``from_cache`` + ``paid`` where
        no call failed; ``retries`` and tokens belong to the paid ones; ``timed_out`` and
        ``dropped`` count attempts that the endpoint may charge for without having delivered;
        ``cost_usd`` is what was paid, and for those the most that they can have cost;
        ``refused``, ``truncated`` and ``malformed`` count among all that were asked.
        """
        names = ("asked", "from_cache", "paid", "retries", "timed_out", "dropped")
        tokens = ("prompt_tokens", "completion_tokens")
        problems = ("refused", "truncated", "malformed")
        counts = {name: self._counts[name] for name in (*names, *tokens, *problems)}
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

    def _obtain(self, batch: Mapping[str, _Payload]) -> dict[str, Reply]:
        """The replies to a batch: what others have paid for meanwhile, and the rest paid for now.

        Under the lock from look-up to storing: two workers that want the same pay once.
        """
        with self._replies.locked():
            found = self._look_up(batch)
            unpaid = {key: payload for key, payload in batch.items() if key not in found}
            return found | self._pay(unpaid) if unpaid else found

    def _pay(self, batch: Mapping[str, _Payload]) -> dict[str, Reply]:
        self._check_budget([self._at_most_usd(payload) for payload in batch.values()])
        stop = Event()
        # In a thread of its own: an interrupt then strikes the one that waits, not those that pay.
        with ThreadPoolExecutor(1) as thread:
            paying = thread.submit(asyncio.run, self._send_all(batch, stop))
            try:
                return paying.result()
            finally:
                stop.set()

    async def _send_all(self, batch: Mapping[str, _Payload], stop: Event) -> dict[str, Reply]:
        found: dict[str, Reply] = {}
        failures: list[BaseException] = []
        waiting = iter(batch.items())

        async def work() -> None:
            for key, payload in waiting:
                try:
                    reply = await self._ask(client, payload, stop)
                except Exception as error:
                    failures.append(error)
                    stop.set()
                else:
                    if reply is not None:
                        found[key] = reply

        async with ChatClient(self._settings) as client:
            await asyncio.gather(*(work() for _ in range(self._settings.concurrency)))
        _log.info("%s: %d rationales paid for", self._settings.model, self._counts["paid"])
        if failures:
            raise failures[0]
        return found

    async def _ask(self, client: ChatClient, payload: _Payload, stop: Event) -> Reply | None:
        """The stored reply, after as many attempts as it takes; None if all is to stop before."""
        attempt = 0
        while not stop.is_set():
            attempt += 1
            try:
                reply = await self._attempt(client, payload)
            except ChatApiError as error:
                if error.wait_seconds is None or attempt == self._settings.max_attempts:
                    raise
                await _pause(error.wait_seconds or back_off(attempt), stop)
            else:
                self._counts["retries"] += attempt - 1
                return reply
        return None

    async def _attempt(self, client: ChatClient, payload: _Payload) -> Reply:
        at_most = self._at_most_usd(payload)
        self._check_budget([at_most])
        booking = self._replies.book(payload, self._study, at_most)
        arguments = {name: value for name, value in payload.items() if name != "base_url"}
        try:
            body = await client.send(arguments)
        except ChatApiError as error:
            if error.loss is None:
                self._replies.release(booking)
            else:
                self._counts[error.loss] += 1
                self._cost_usd += at_most
            raise
        reply = self._priced(payload, body)
        self._counts["paid"] += 1
        self._counts["prompt_tokens"] += reply.prompt_tokens or 0
        self._counts["completion_tokens"] += reply.completion_tokens or 0
        self._cost_usd += reply.cost_usd
        self._replies.settle(booking, reply)
        return reply

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

    def _check_budget(self, estimates: Sequence[float]) -> None:
        """Hold the next requests against what is paid and booked; under the store's lock."""
        cap, estimate = self._settings.budget_usd, sum(estimates)
        spent, booked = self._replies.spent_usd(self._study), self._replies.booked_usd(self._study)
        if spent + estimate <= cap * (1 + 1e-9):  # sums in another order differ in the last bits
            return
        unanswered = f" (${booked:.6f} of it booked for requests without a reply)" if booked else ""
        raise BudgetExceeded(
            f"rationales.budget_usd: study {self._study} has spent ${spent:.6f}{unanswered}, and "
            f"the next {len(estimates)} requests to {self._settings.model} could cost up to "
            f"${estimate:.6f}: more than the cap of ${cap:.6f}. Raise the cap to at least "
            f"${spent + estimate:.6f}, or lower rationales.max_tokens. What was paid for is kept: "
            "run again to go on."
        )


async def _pause(seconds: float, stop: Event) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop.is_set():
        await asyncio.sleep(min(left, _TICK_SECONDS))


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
