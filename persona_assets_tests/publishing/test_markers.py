"""Markers: of one content at one place, pending until it is there."""

from __future__ import annotations

import pytest

from persona_assets.publishing.markers import Marker, Markers, Unpublished, published_audit
from persona_assets.store import Ref

REF = Ref("wandb_run", "librarian.garbage_cot.42")


@pytest.fixture
def markers(tmp_path) -> Markers:
    return Markers(tmp_path, "mini")


def unreachable() -> str:
    raise Unpublished("nobody answers")


def never() -> str:
    raise AssertionError("it was sent twice")


def test_what_cannot_be_sent_is_pending_until_it_is(markers, tmp_path):
    pending = Marker("pending", "v1", "host/project", why="nobody answers")
    assert markers.publish(REF, "v1", "host/project", unreachable) == pending
    assert markers.read(REF) == pending
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")] == [
        "mini/wandb_run/librarian.garbage_cot.42.json"
    ]
    done = Marker("published", "v1", "host/project", url="url")
    assert markers.publish(REF, "v1", "host/project", lambda: "url") == done
    assert markers.publish(REF, "v1", "host/project", never) == done
    assert markers.read(REF) == done


def test_other_content_and_another_place_are_sent_anew(markers):
    markers.publish(REF, "v1", "host/project", lambda: "url")
    assert markers.publish(REF, "v2", "host/project", lambda: "other").url == "other"
    assert markers.publish(REF, "v2", "host/else", lambda: "else").url == "else"
    assert markers.publish(REF, "v1", "host/else", "no key").why == "no key"


def test_what_is_no_refusal_is_raised_and_leaves_no_marker(markers):
    def broken() -> str:
        raise ValueError("a fault of ours")

    with pytest.raises(ValueError, match="a fault of ours"):
        markers.publish(REF, "v1", "host/project", broken)
    assert markers.read(REF) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "published"}', '{"other": 1}'])
def test_a_damaged_marker_is_none(markers, text):
    path = markers.path(Ref("hub_upload"))
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert markers.read(Ref("hub_upload")) is None
    assert markers.publish(Ref("hub_upload"), "v1", "hub", lambda: "url").url == "url"


def test_the_check_warns_and_never_blocks():
    pending = published_audit(Marker("pending", "v1", "host/project", why="nobody answers"))
    assert (pending.status, pending.blocks) == ("unverifiable", False)
    assert pending.observed == "pending: nobody answers"
    done = published_audit(Marker("published", "v1", "host/project", url="url"))
    assert (done.status, done.observed, done.blocking) == ("passed", "url", False)
