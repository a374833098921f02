"""An endpoint that fails, in every way that one can: what is asked again, and what is booked."""

from __future__ import annotations

import threading

import pytest

from persona_assets.rationales.chat_api import BudgetExceeded, ChatApiWriter
from persona_assets.rationales.chat_client import ChatApiError, ChatApiUnavailable
from persona_assets.rationales.replies import Replies
from persona_assets_tests.chat_server import Arrival, Step, chat_server, completion, failure
from persona_assets_tests.rationales.chat import (
    COST,
    at_most,
    echo,
    expected,
    requests,
    settings,
)


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


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (failure(400, "bad model"), r"answered 400: .*bad model.* see rationales\.model"),
        (failure(401, "who?"), r"answered 401: .*who\?.* environment variable TEST_CHAT_API_KEY "),
        (failure(403, "no"), r"answered 403: .* environment variable TEST_CHAT_API_KEY "),
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


def test_a_reply_without_end_is_broken_off_and_booked(replies: Replies):
    with chat_server(lambda _: Step(body=" " * 4_100_000)) as server:
        writer = ChatApiWriter(settings(server.url, concurrency=1), replies, "mini")
        with pytest.raises(ChatApiError, match="answered with more than 4000000 bytes"):
            writer.write(requests(1))
        assert len(server.arrivals) == 1
    assert replies.booked_usd("mini") > 0


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
