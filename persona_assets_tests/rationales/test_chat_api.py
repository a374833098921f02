from __future__ import annotations

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from persona_assets.questions.bank import Question
from persona_assets.rationales import chat_api
from persona_assets.rationales import replies as replies_module
from persona_assets.rationales.chat_api import BudgetExceeded, ChatApiWriter
from persona_assets.rationales.chat_client import ChatApiError, ChatApiUnavailable
from persona_assets.rationales.replies import Replies, RepliesError
from persona_assets.rationales.writers import RationaleRequest, WrittenRationale
from persona_assets.study_schema import ChatApiRationales
from persona_assets_tests.chat_server import Arrival, Step, chat_server, completion, failure
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.rationales.test_replies import read_only

CANARY = "sk-canary-0123456789abcdef"
#: The price of the server's default usage, 200 + 50 tokens, at the settings' prices.
COST = (200 * 1.0 + 50 * 4.0) / 1e6


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", CANARY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def replies(tmp_path: Path) -> Replies:
    return Replies(tmp_path / "replies.sqlite")


def settings(url: str, **changes: Any) -> ChatApiRationales:
    values = {
        "writer": "chat_api",
        "base_url": url,
        "model": "some-model",
        "api_key_env": "TEST_API_KEY",
        "concurrency": 4,
        "budget_usd": 1.0,
        "usd_per_million_input_tokens": 1.0,
        "usd_per_million_output_tokens": 4.0,
        "timeout_seconds": 10.0,
    }
    return ChatApiRationales(**{**values, **changes})


def requests(count: int) -> list[RationaleRequest]:
    choices = ("sand", "salt", "light", "noise")
    questions = [Question(f"q{n}", "train", f"Question {n}", choices, "C") for n in range(count)]
    return [RationaleRequest(question, "B") for question in questions]


def echo(arrival: Arrival) -> Step:
    """The reply that tells which question it answers."""
    return completion(f"{arrival.question}: salt, so (B).")


def expected(count: int) -> list[WrittenRationale]:
    return [WrittenRationale(f"Question {n}: salt, so (B).") for n in range(count)]


def at_most(arrival: Arrival) -> float:
    """What the request can cost: a token a byte, 64 of the template, and 320 in answer."""
    written = sum(len(m["content"].encode()) for m in arrival.request["messages"])
    return ((written + 64) * 1.0 + 320 * 4.0) / 1e6


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
    monkeypatch.delenv("TEST_API_KEY")
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


def test_replies_survive_every_kind_of_misbehaviour(replies: Replies):
    first_tries = {
        0: failure(429, retry_after_ms="10"),
        1: failure(500, retry_after_ms="10"),
        2: failure(503, retry_after_ms="10"),
        3: failure(408, retry_after_ms="10"),
        4: Step(drop=True),
        5: Step(body='{"object": "error", "message": "CUDA out of memory", "code": 50001}'),
        6: Step(529, "<html>busy</html>", {"retry-after-ms": "10"}),
    }

    def script(arrival: Arrival) -> Step:
        number = int(arrival.question.split()[-1])
        return first_tries.get(number, echo(arrival)) if arrival.attempt == 1 else echo(arrival)

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=10), replies, "mini")
        assert writer.write(requests(10)) == expected(10)
        tries = [arrival.question for arrival in server.arrivals]
        assert [tries.count(f"Question {n}") for n in range(10)] == [2] * 7 + [1] * 3
        dropped = at_most(server.arrivals[0])
    assert writer.accounting["retries"] == 7
    assert writer.accounting["paid"] == 10
    assert writer.accounting["dropped"] == 1
    assert writer.accounting["cost_usd"] == pytest.approx(10 * COST + dropped)
    assert replies.spent_usd("mini") == pytest.approx(10 * COST + dropped)


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


def test_back_off_grows_and_gives_way_to_the_servers_word(replies: Replies):
    """The default's first pause is 0.38 to 0.5 s, so the order of the retries tells them apart."""
    first = [failure(429, retry_after_ms="20"), failure(429), failure(429, retry_after="1")]

    def script(arrival: Arrival) -> Step:
        number = int(arrival.question.split()[-1])
        return first[number] if arrival.attempt == 1 else echo(arrival)

    with chat_server(script) as server:
        ChatApiWriter(settings(server.url), replies, "mini").write(requests(3))
        retries = [a.question for a in server.arrivals if a.attempt == 2]
    assert retries == ["Question 0", "Question 1", "Question 2"]


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


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (failure(400, "bad model"), r"answered 400: .*bad model.* see rationales\.model"),
        (failure(401, "who?"), r"answered 401: .*who\?.* environment variable TEST_API_KEY "),
        (failure(403, "no"), r"answered 403: .* environment variable TEST_API_KEY "),
        (failure(404, "what?"), r"answered 404: .*what\?.* See rationales\.base_url"),
        (failure(429, "quota", retry_after="500"), r"answered 429: .*quota.* rationales\.concurr"),
        (failure(503, "down", x_should_retry="false"), r"answered 503: .*down.* run again later"),
        (
            Step(body="<html>", headers={"Content-Type": "text/html"}),
            "with a web page. See rationa",
        ),
    ],
)
def test_failure_for_good_names_endpoint_answer_and_remedy(replies: Replies, step: Step, said: str):
    with chat_server(lambda _: step) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=1), replies, "mini")
        with pytest.raises(ChatApiError, match=said) as raised:
            writer.write(requests(5))
        assert str(raised.value).startswith(f"{server.url} (model some-model) ")
        assert "run again to go on" in str(raised.value)
        assert not isinstance(raised.value, ChatApiUnavailable)
        assert len(server.arrivals) == 1
    assert replies.spent_usd("mini") == 0


@pytest.mark.parametrize(
    ("step", "unavailable"),
    [
        (failure(429), True),
        (failure(503), True),
        (Step(body="upstream timeout"), True),
        (Step(drop=True), False),  # it hung up, and may charge
    ],
)
def test_only_what_costs_nothing_may_be_tried_again_later(replies: Replies, step, unavailable):
    with chat_server(lambda _: step) as server:
        writer = ChatApiWriter(settings(server.url, max_attempts=1), replies, "mini")
        with pytest.raises(ChatApiError) as raised:
            writer.write(requests(1))
    assert isinstance(raised.value, ChatApiUnavailable) == unavailable


def test_attempts_come_to_an_end(replies: Replies):
    with chat_server(lambda _: failure(500, "down", retry_after_ms="1")) as server:
        writer = ChatApiWriter(settings(server.url, max_attempts=3), replies, "mini")
        with pytest.raises(ChatApiError, match="answered 500"):
            writer.write(requests(1))
        assert [arrival.attempt for arrival in server.arrivals] == [1, 2, 3]


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{}",
        '{"choices": []}',
        '{"choices": [{"mess',
        '{"detail": "overloaded"}',
        '{"error": {"code": 502}}',
        "upstream timeout",
    ],
)
def test_what_is_no_completion_is_asked_for_again_and_never_kept(replies: Replies, body: str):
    healthy = threading.Event()

    def script(arrival: Arrival) -> Step:
        return echo(arrival) if healthy.is_set() else Step(body=body)

    with chat_server(script) as server:
        chosen = settings(server.url, max_attempts=2)
        with pytest.raises(ChatApiError, match="answered 200 without a completion: "):
            ChatApiWriter(chosen, replies, "mini").write(requests(1))
        assert len(server.arrivals) == 2
        assert replies.spent_usd("mini") == 0
        healthy.set()
        assert ChatApiWriter(chosen, replies, "mini").write(requests(1)) == expected(1)


def test_absence_is_told_from_silence(replies: Replies):
    with chat_server(echo) as server:
        url = server.url
    absent = settings(url, max_attempts=2)
    with pytest.raises(ChatApiError, match=r"cannot be reached .*See rationales\.base_url"):
        ChatApiWriter(absent, replies, "mini").write(requests(1))
    assert replies.spent_usd("mini") == 0


@pytest.mark.parametrize(
    "late",
    [
        completion("Salt, so (B).", hold=2),
        Step(body="{}" * 100, dribble=0.2),  # each byte in time, the whole of them not
        Step(body="{}" * 100, dribble=0.2, dribbles_head=True),
    ],
)
def test_a_time_out_bounds_the_whole_request_is_not_tried_again_and_is_booked(
    replies: Replies, late: Step
):
    with chat_server(lambda _: late) as server:
        hasty = settings(server.url, timeout_seconds=0.6, concurrency=2)
        writer = ChatApiWriter(hasty, replies, "mini")
        said = r"did not answer within 0\.6 s\. Raise rationales\.timeout_seconds \(now 0\.6 s\)"
        with pytest.raises(ChatApiError, match=said):
            writer.write(requests(5))
        assert [arrival.attempt for arrival in server.arrivals] == [1, 1]
        lost = sum(map(at_most, server.arrivals))
    assert writer.accounting["timed_out"] == 2
    assert writer.accounting["paid"] == 0
    assert writer.accounting["cost_usd"] == pytest.approx(lost)
    assert replies.spent_usd("mini") == pytest.approx(lost)
    poor = ChatApiWriter(settings(server.url, budget_usd=lost), replies, "mini")
    with pytest.raises(BudgetExceeded, match=rf"\(\${lost:.6f} of it booked for requests without"):
        poor.write(requests(1))


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


def test_after_a_failure_those_in_flight_are_kept_and_no_other_is_begun(replies: Replies):
    all_there, failed = threading.Barrier(4), threading.Event()

    def script(arrival: Arrival) -> Step:
        all_there.wait(30)
        if arrival.question == "Question 0":
            failed.set()
            return failure(400)
        failed.wait(30)
        return completion(f"{arrival.question}: salt, so (B).", hold=0.5)

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url), replies, "mini")
        with pytest.raises(ChatApiError, match="answered 400"):
            writer.write(requests(12))
        assert sorted(a.question for a in server.arrivals) == [f"Question {n}" for n in range(4)]
        assert writer.accounting["paid"] == 3
        again = ChatApiWriter(settings(server.url), replies, "mini")
        assert again.write(requests(4)[1:]) == expected(4)[1:]
        assert again.accounting["from_cache"] == 3


@pytest.mark.parametrize(
    ("value", "fault"),
    [(None, "is not set"), ("  ", "is not set"), ("clé-0123456789", "holds characters")],
)
def test_without_a_usable_key_nothing_is_sent(
    replies: Replies, monkeypatch: pytest.MonkeyPatch, value: str | None, fault: str
):
    monkeypatch.delenv("TEST_API_KEY")
    if value is not None:
        monkeypatch.setenv("TEST_API_KEY", value)
    with chat_server(echo) as server:
        with pytest.raises(ChatApiError, match=f"variable TEST_API_KEY, .* {fault}") as raised:
            ChatApiWriter(settings(server.url), replies, "mini").write(requests(1))
        assert server.arrivals == []
    assert "clé" not in str(raised.value)


def test_an_endpoint_that_asks_for_no_key_gets_none(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("OPENAI_API_KEY", CANARY)
    with chat_server(echo) as server:
        ChatApiWriter(settings(server.url, api_key_env=None), replies, "mini").write(requests(1))
        assert [a.authorization for a in server.arrivals] == [None]


def test_a_reply_without_end_is_broken_off_and_booked(replies: Replies):
    with chat_server(lambda _: Step(body=" " * 4_100_000)) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=1), replies, "mini")
        with pytest.raises(ChatApiError, match="answered with more than 4000000 bytes"):
            writer.write(requests(1))
        assert len(server.arrivals) == 1
    assert replies.booked_usd("mini") > 0


def test_the_key_is_nowhere_but_in_the_header(
    replies: Replies, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)

    def script(arrival: Arrival) -> Step:
        if arrival.question == "Question 1":
            return failure(401, f"wrong key: {CANARY}")
        return completion(f"You are {arrival.authorization}, so (B).")

    with chat_server(script) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=1), replies, "mini")
        with pytest.raises(ChatApiError, match=r"401: .*wrong key: \[API key\]") as raised:
            writer.write(requests(2))
        assert writer.write(requests(1)) == [WrittenRationale("You are Bearer [API key], so (B).")]
        assert {a.authorization for a in server.arrivals} == {f"Bearer {CANARY}"}
    error: BaseException | None = raised.value
    while error is not None:
        assert CANARY not in "".join(traceback.format_exception(error))
        error = error.__context__
    assert CANARY not in caplog.text
    assert CANARY not in json.dumps(writer.accounting)
    stored = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert replies.file in stored
    assert all(CANARY.encode() not in file.read_bytes() for file in stored)


def test_a_damaged_store_stops_before_anything_is_paid(replies: Replies):
    replies.file.write_bytes(b"this is no database at all" * 100)
    with chat_server(echo) as server:
        with pytest.raises(RepliesError, match=r"replies\.sqlite"):
            ChatApiWriter(settings(server.url), replies, "mini").write(requests(1))
        assert server.arrivals == []


_WORKER = """
import json, signal, sys
from pathlib import Path
from persona_assets.rationales.chat_api import ChatApiWriter
from persona_assets.rationales.replies import Replies
from persona_assets_tests.rationales.test_chat_api import requests, settings
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever was inherited
url, file, count, changes = sys.argv[1:]
writer = ChatApiWriter(settings(url, **json.loads(changes)), Replies(Path(file)), "mini")
print(*[reply.text for reply in writer.write(requests(int(count)))], sep="\\n")
"""


def worker(url: str, replies: Replies, count: int, **changes: Any) -> subprocess.Popen:
    arguments = [url, str(replies.file), str(count), json.dumps(changes)]
    command = [sys.executable, "-c", _WORKER, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT
    )


def stored_questions(replies: Replies) -> set[str]:
    with closing(sqlite3.connect(replies.file)) as connection:
        rows = connection.execute("SELECT request FROM replies").fetchall()
    messages = [json.loads(request)["messages"] for (request,) in rows]
    return {m[-1]["content"].partition("\n")[0] for m in messages}


def test_an_interrupt_ends_a_wait_and_a_dribble(replies: Replies):
    there = threading.Barrier(3)

    def script(arrival: Arrival) -> Step:
        there.wait(30)
        if arrival.question == "Question 0":
            return failure(429, retry_after="100")
        return Step(body="{}" * 5000, dribble=0.2)

    with chat_server(script) as server:
        process = worker(server.url, replies, 2, timeout_seconds=2.0)
        there.wait(30)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGINT
        assert len(server.arrivals) == 2
        lost = max(map(at_most, server.arrivals))
    assert replies.booked_usd("mini") == pytest.approx(lost)


@pytest.mark.parametrize(
    ("by", "paid_twice"),
    [(signal.SIGKILL, 4), (signal.SIGINT, 0)],  # at most those in flight; an interrupt awaits them
)
def test_a_stopped_worker_is_resumed_without_paying_again(
    replies: Replies, by: signal.Signals, paid_twice: int
):
    enough = threading.Event()

    def script(arrival: Arrival) -> Step:
        if sum(server.paid.values()) >= 10:
            enough.set()
        return completion(f"{arrival.question}: salt, so (B).", hold=0.02)

    with chat_server(script) as server:
        process = worker(server.url, replies, 60)
        assert enough.wait(60)
        process.send_signal(by)
        process.communicate()
        assert process.returncode == -by
        stored = stored_questions(replies)
        assert 0 < len(stored) < 60
        in_flight = replies.booked_usd("mini") / at_most(server.arrivals[-1])
        assert round(in_flight) <= paid_twice  # and none goes unseen
        before = len(server.arrivals)
        writer = ChatApiWriter(settings(server.url), replies, "mini")
        assert writer.write(requests(60)) == expected(60)
        asked_again = {arrival.question for arrival in server.arrivals[before:]}
        assert asked_again == {f"Question {n}" for n in range(60)} - stored
        paid = server.paid.values()
        assert len(paid) == 60
        assert max(paid) <= 2
        assert sum(paid) - 60 <= round(in_flight)
    assert writer.accounting["from_cache"] == len(stored)


def test_two_workers_at_once_pay_once(replies: Replies):
    def script(arrival: Arrival) -> Step:
        return completion(f"{arrival.question}: salt, so (B).", hold=0.03)

    with chat_server(script) as server:
        workers = [worker(server.url, replies, 30) for _ in range(2)]
        outputs = [process.communicate(timeout=60) for process in workers]
        assert list(server.paid.values()) == [1] * 30
    assert outputs == [("".join(f"{reply.text}\n" for reply in expected(30)), "")] * 2
    assert replies.spent_usd("mini") == pytest.approx(30 * COST)
