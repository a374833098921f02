from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from persona_assets.rationales import replies as replies_module
from persona_assets.rationales.replies import Replies, RepliesError, Reply, key_of

CONNECT = sqlite3.connect
REQUEST = {"model": "m", "messages": [{"role": "user", "content": "é?"}], "temperature": 0}
REPLY = Reply('{"text": "naïve \\u0000"}', 200, 50, 0.25)


@pytest.fixture
def replies(tmp_path: Path) -> Replies:
    return Replies(tmp_path / "new" / "replies.sqlite")


def read_only(file: Path, **options: float) -> sqlite3.Connection:
    return CONNECT(f"file:{file}?mode=ro", uri=True, **options)


def paid(replies: Replies, request: dict, reply: Reply, study: str) -> None:
    replies.settle(replies.book(request, study, 1.0), reply)


def test_what_was_added_is_found_by_its_request(replies: Replies):
    paid(replies, REQUEST, REPLY, "mini")
    unsaid = Reply("", None, None, 0.0)
    other = {**REQUEST, "model": "n"}
    paid(replies, other, unsaid, "mini")
    again = Replies(replies.file)
    keys = [key_of(REQUEST), key_of(other), key_of({})]
    assert again.get(keys) == {keys[0]: REPLY, keys[1]: unsaid}


def test_the_key_is_the_content_not_the_order_of_fields():
    assert key_of(dict(reversed(REQUEST.items()))) == key_of(REQUEST)
    assert key_of({**REQUEST, "temperature": 1}) != key_of(REQUEST)


def test_the_request_stands_beside_its_reply(replies: Replies):
    paid(replies, REQUEST, REPLY, "mini")
    with closing(sqlite3.connect(replies.file)) as connection:
        [(request, study, made)] = connection.execute(
            "SELECT request, study, created_at FROM replies"
        )
    assert json.loads(request) == REQUEST
    assert study == "mini"
    assert made.endswith("+00:00")


def test_spending_is_counted_by_study(replies: Replies):
    assert replies.spent_usd("mini") == 0
    for number, study in enumerate(["mini", "mini", "other"]):
        paid(replies, {"n": number}, REPLY, study)
    assert replies.spent_usd("mini") == 0.5
    assert replies.spent_usd("other") == 0.25


def test_paying_twice_is_an_error_and_keeps_the_first_reply(replies: Replies):
    paid(replies, REQUEST, REPLY, "mini")
    with pytest.raises(RepliesError, match=r"replies\.sqlite: a reply was paid for twice"):
        paid(replies, REQUEST, Reply("other", 1, 1, 9.0), "mini")
    assert replies.get([key_of(REQUEST)]) == {key_of(REQUEST): REPLY}


def test_a_booking_counts_until_it_is_settled_or_released(replies: Replies):
    first, second = (replies.book({"n": n}, "mini", 2.0) for n in range(2))
    replies.book({"n": 0}, "other", 8.0)
    assert replies.spent_usd("mini") == replies.booked_usd("mini") == 4.0
    replies.settle(first, REPLY)
    replies.release(second)
    assert (replies.spent_usd("mini"), replies.booked_usd("mini")) == (0.25, 0.0)
    assert Replies(replies.file).spent_usd("other") == 8.0


def test_a_reply_that_cannot_be_stored_is_set_aside_and_taken_in(
    replies: Replies, monkeypatch: pytest.MonkeyPatch
):
    booking = replies.book(REQUEST, "mini", 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(replies_module.sqlite3, "connect", read_only)
        with pytest.raises(RepliesError, match=r"replies\.sqlite: .*readonly"):
            replies.settle(booking, REPLY)
        with pytest.raises(RepliesError, match="readonly"), replies.locked():
            pytest.fail("nothing may be paid for while replies wait to be taken in")
    assert replies.get([key_of(REQUEST)]) == {}
    with replies.locked():
        assert replies.get([key_of(REQUEST)]) == {key_of(REQUEST): REPLY}
        assert replies.spent_usd("mini") == 0.25
    assert not [*replies.file.parent.glob("*.json")]
    with replies.locked():
        assert replies.spent_usd("mini") == 0.25


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").touch()
    replies = Replies(tmp_path / "file" / "replies.sqlite")
    with pytest.raises(RepliesError, match=r"replies\.sqlite: .*writable"), replies.locked():
        pytest.fail("no lock")


def test_threads_add_at_once(replies: Replies):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: paid(replies, {"n": n}, REPLY, "mini"), range(40)))
    assert replies.spent_usd("mini") == 10.0


def test_a_damaged_file_is_named_with_the_remedy_and_left_alone(replies: Replies):
    content = b"no database, but long enough to be taken for one" * 40
    replies.file.parent.mkdir()
    replies.file.write_bytes(content)
    with pytest.raises(RepliesError, match=r"replies\.sqlite: .* damaged .*\.recover`; moved away"):
        replies.get(["k"])
    assert replies.file.read_bytes() == content


def test_a_page_overwritten_is_damage_not_an_empty_answer(replies: Replies):
    for number in range(50):
        paid(replies, {"n": number}, Reply("x" * 4000, 1, 1, 0.0), "mini")
    content = bytearray(replies.file.read_bytes())
    content[4096 * 2 : 4096 * 20] = b"\xff" * (4096 * 18)
    replies.file.write_bytes(content)
    with pytest.raises(RepliesError, match="damaged"):
        replies.get([key_of({"n": number}) for number in range(50)])


def test_another_database_is_not_taken_for_ours(replies: Replies):
    replies.file.parent.mkdir()
    with closing(sqlite3.connect(replies.file)) as connection:
        connection.execute("CREATE TABLE replies (something)")
    with pytest.raises(RepliesError, match=r"replies\.sqlite: .*no such column"):
        replies.get(["k"])


def test_the_lock_admits_one_at_a_time(replies: Replies):
    inside, most = 0, 0
    together = threading.Barrier(4)

    def pay() -> None:
        nonlocal inside, most
        together.wait(10)
        with replies.locked():
            inside += 1
            most = max(most, inside)
            replies.spent_usd("mini")  # lets the others run
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(pay) for _ in range(4)]:
            future.result()
    assert most == 1


def test_the_lock_of_a_killed_process_is_free(replies: Replies):
    holder = (
        "import sys, time; from pathlib import Path\n"
        "from persona_assets.rationales.replies import Replies\n"
        "with Replies(Path(sys.argv[1])).locked():\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    command = [sys.executable, "-c", holder, str(replies.file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    with replies.locked():
        assert replies.spent_usd("mini") == 0
