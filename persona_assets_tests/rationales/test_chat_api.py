"""What is asked, what it costs, and where the asking ends."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

import pytest

from persona_assets.rationales import chat_api
from persona_assets.rationales import replies as replies_module
from persona_assets.rationales.chat_api import BudgetExceeded, ChatApiWriter
from persona_assets.rationales.replies import Replies, RepliesError
from persona_assets.rationales.writers import RationaleRequest
from persona_assets_tests.chat_server import Arrival, Step, chat_server, completion
from persona_assets_tests.rationales.chat import (
    CANARY,
    COST,
    at_most,
    echo,
    expected,
    requests,
    settings,
)
from persona_assets_tests.rationales.test_replies import read_only


def test_each_request_is_asked_once_and_answered_in_order(replies: Replies):
    with chat_server(echo) as server:
        writer = ChatApiWriter(settings(server.url), replies, "mini")
        asked = requests(10)
        assert writer.write([*asked, *reversed(asked)]) == [*expected(10), *reversed(expected(10))]
        assert list(server.paid.values()) == [1] * 10
        assert writer.write(asked[:3]) == expected(3)
        assert len(server.arrivals) == 10
    assert writer.accounting == {
        "model": "some-model",
        "asked": 13,
        "from_cache": 3,
        "paid": 10,
        "retries": 0,
        "timed_out": 0,
        "dropped": 0,
        "prompt_tokens": 2000,
        "completion_tokens": 500,
        "refused": 0,
        "truncated": 0,
        "malformed": 0,
        "cost_usd": pytest.approx(10 * COST),
    }
    assert replies.spent_usd("mini") == pytest.approx(10 * COST)


def test_the_request_is_what_the_settings_say(replies: Replies):
    with chat_server(echo) as server:
        writer = ChatApiWriter(settings(server.url, max_tokens=99), replies, "mini")
        [request] = requests(1)
        persona = RationaleRequest(request.question, "B", "librarian", "You are a librarian.")
        writer.write([persona])
        [arrival] = server.arrivals
    sent = arrival.request
    assert sent.pop("messages")[0]["content"].startswith("You are a librarian.")
    assert sent == {"model": "some-model", "temperature": 0, "max_tokens": 99}
    assert arrival.authorization == f"Bearer {CANARY}"


def test_a_full_cache_needs_neither_key_nor_server(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    with chat_server(echo) as server:
        ChatApiWriter(settings(server.url), replies, "mini").write(requests(3))
        url = server.url
    monkeypatch.delenv("TEST_CHAT_API_KEY")
    writer = ChatApiWriter(settings(f"{url}/", budget_usd=0), replies, "another")
    assert writer.write(requests(3)) == expected(3)
    assert writer.accounting["paid"] == writer.accounting["cost_usd"] == 0
    assert replies.spent_usd("another") == 0


@pytest.mark.parametrize("change", [{"model": "other"}, {"max_tokens": 100}])
def test_what_changes_the_reply_is_asked_anew(replies: Replies, change: dict[str, Any]):
    with chat_server(echo) as server:
        ChatApiWriter(settings(server.url), replies, "mini").write(requests(2))
        ChatApiWriter(settings(server.url, **change), replies, "mini").write(requests(2))
        assert len(server.arrivals) == 4


def test_paid_replies_of_no_use_are_kept_and_counted(replies: Replies):
    steps = [
        completion("I'm sorry, but I can't help with that."),
        completion(None, refusal="No."),
        completion("", finish_reason="content_filter"),
        completion("Salt keeps", finish_reason="length"),
        completion(None),
        completion("Salt it is.\nAnswer: B"),
        completion("Sand, so (A)."),  # the wrong letter: for the condition to drop
    ]

    def script(arrival: Arrival) -> Step:
        return steps[int(arrival.question.split()[-1])]

    problems = ["refused"] * 3 + ["truncated"] + ["malformed"] * 2 + [None]
    with chat_server(script) as server:
        for paid in (7, 0):
            writer = ChatApiWriter(settings(server.url), replies, "mini")
            written = writer.write(requests(7))
            assert [reply.problem for reply in written] == problems
            assert written[-1].text == "Sand, so (A)."
            counted = writer.accounting
            assert [counted[p] for p in ("refused", "truncated", "malformed")] == [3, 1, 2]
            assert (counted["paid"], counted["from_cache"]) == (paid, 7 - paid)
        assert list(server.paid.values()) == [1] * 7


@pytest.mark.parametrize("usage", [None, (-1, 5), (10**12, 5)])
def test_a_reply_without_sound_usage_is_charged_at_the_estimate(
    replies: Replies, usage: tuple[int, int] | None
):
    def script(arrival: Arrival) -> Step:
        return completion("Salt, so (B).", usage=usage)

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url), replies, "mini")
        writer.write(requests(1))
        [arrival] = server.arrivals
    assert writer.accounting["cost_usd"] == pytest.approx(at_most(arrival))
    assert writer.accounting["prompt_tokens"] == 0


def test_concurrency_is_reached_and_never_exceeded(replies: Replies):
    full = threading.Barrier(5)

    def script(arrival: Arrival) -> Step:
        full.wait(30)  # nobody is answered before five are there
        return echo(arrival)

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=5), replies, "mini")
        assert writer.write(requests(20)) == expected(20)
        assert server.most_in_flight == 5


def test_nothing_is_sent_that_could_exceed_the_budget(replies: Replies):
    with chat_server(echo) as server:
        writer = ChatApiWriter(settings(server.url, budget_usd=0.001), replies, "mini")
        with pytest.raises(BudgetExceeded) as raised:
            writer.write(requests(3))
        assert server.arrivals == []
    said = str(raised.value)
    assert said.startswith("rationales.budget_usd: study mini has spent $0.000000, and the next 3 ")
    assert "the cap of $0.001000. Raise the cap to at least $0.00" in said
    assert not replies.get([""])


def test_the_budget_is_looked_at_between_batches_and_what_was_paid_is_kept(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chat_api, "BATCH", 4)
    free_input = {"usd_per_million_input_tokens": 0}
    # So a request is estimated at 320 × $4e-6 = $0.00128, and costs 50 × $4e-6 = $0.0002.
    with chat_server(echo) as server:
        capped = settings(server.url, budget_usd=0.0063, **free_input)
        tight = ChatApiWriter(capped, replies, "mini")
        said = (
            r"has spent \$0\.001600, and the next 4 requests .* up to \$0\.005120: .* \$0\.006720"
        )
        with pytest.raises(BudgetExceeded, match=said):
            tight.write(requests(20))
        assert tight.accounting["paid"] == len(server.arrivals) == 8
        assert tight.accounting["cost_usd"] == pytest.approx(8 * 0.0002)
        other = ChatApiWriter(capped, replies, "other")  # what another study spent is not counted
        assert other.write(requests(9)) == expected(9)
        assert other.accounting["paid"] == 1
        wide = ChatApiWriter(settings(server.url, **free_input), replies, "mini")
        assert wide.write(requests(20)) == expected(20)
        assert wide.accounting["from_cache"] == 9
        assert list(server.paid.values()) == [1] * 20
    assert replies.spent_usd("mini") == pytest.approx(19 * 0.0002)


def test_the_estimate_bounds_what_is_spent(replies: Replies, monkeypatch: pytest.MonkeyPatch):
    """Whatever the endpoint counts, as long as it keeps to max_tokens and to a token a byte."""
    monkeypatch.setattr(chat_api, "BATCH", 4)

    def script(arrival: Arrival) -> Step:
        written = sum(len(m["content"].encode()) for m in arrival.request["messages"])
        return completion("Salt, so (B).", usage=(written, 320))

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url, budget_usd=0.03), replies, "mini")
        with pytest.raises(BudgetExceeded):
            writer.write(requests(40))
        paid = len(server.arrivals)
    spent = replies.spent_usd("mini")
    assert 0 < paid < 40
    assert 0.03 - 5 * spent / paid < spent <= 0.03  # not a batch more would have fitted


def test_an_endpoint_that_writes_more_than_it_may_is_stopped_within_the_batch(replies: Replies):
    def script(arrival: Arrival) -> Step:
        return completion("Salt, so (B).", usage=(0, 5000))  # $0.02 a reply

    with chat_server(script) as server:
        capped = settings(server.url, budget_usd=0.05, concurrency=2)
        writer = ChatApiWriter(capped, replies, "mini")
        with pytest.raises(BudgetExceeded, match=r"and the next 1 requests"):
            writer.write(requests(12))  # at most $0.05 in all, had it kept to max_tokens
        assert len(server.arrivals) == writer.accounting["paid"] < 5
        assert replies.spent_usd("mini") == pytest.approx(0.02 * len(server.arrivals))


def test_a_store_that_cannot_be_written_stops_before_anything_is_sent(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    replies.spent_usd("mini")  # the file is there
    monkeypatch.setattr(replies_module.sqlite3, "connect", read_only)
    with chat_server(echo) as server:
        for _ in range(2):
            with pytest.raises(RepliesError, match=r"replies\.sqlite: .*readonly"):
                ChatApiWriter(settings(server.url), replies, "mini").write(requests(9))
        assert server.arrivals == []


def test_a_store_that_fills_up_loses_no_reply_and_ends_the_sending(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    with chat_server(echo) as server, monkeypatch.context() as patch:
        patch.setattr(replies_module, "_store", full_disk)
        writer = ChatApiWriter(settings(server.url, concurrency=3), replies, "mini")
        with pytest.raises(RepliesError, match=r"replies\.sqlite: .*disk is full"):
            writer.write(requests(20))
        sent = len(server.arrivals)
        assert sent <= 3
        with pytest.raises(RepliesError, match="disk is full"):
            ChatApiWriter(settings(server.url), replies, "mini").write(requests(20))
        assert len(server.arrivals) == sent
        patch.undo()
        again = ChatApiWriter(settings(server.url), replies, "mini")
        assert again.write(requests(20)) == expected(20)
        assert again.accounting["from_cache"] == sent
        assert list(server.paid.values()) == [1] * 20
    assert replies.spent_usd("mini") == pytest.approx(20 * COST)


def full_disk(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_a_damaged_store_stops_before_anything_is_paid(replies: Replies):
    replies.file.write_bytes(b"this is no database at all" * 100)
    with chat_server(echo) as server:
        with pytest.raises(RepliesError, match=r"replies\.sqlite"):
            ChatApiWriter(settings(server.url), replies, "mini").write(requests(1))
        assert server.arrivals == []
