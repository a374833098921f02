"""Processes that are stopped while they ask, and two that ask at once."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from typing import Any

import pytest

from persona_assets.rationales.chat_api import ChatApiWriter
from persona_assets.rationales.replies import Replies
from persona_assets_tests.chat_server import Arrival, Step, chat_server, completion, failure
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.rationales.chat import (
    COST,
    at_most,
    expected,
    requests,
    settings,
)

_WORKER = """
import json, signal, sys
from pathlib import Path
from persona_assets.rationales.chat_api import ChatApiWriter
from persona_assets.rationales.replies import Replies
from persona_assets_tests.rationales.chat import requests, settings
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
        whole = [arrival for arrival in server.arrivals if arrival.body]  # the last may be cut off
        in_flight = replies.booked_usd("mini") / at_most(whole[-1])
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
