"""Markers: what of a study has been published, and what still is to be.

One file a partition, ``publish/<study>/<asset>[/<key>].json`` in the data folder. A marker is of
one content at one place: whatever else is published anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from persona_assets.audit import Audit, audit
from persona_assets.store import Ref, write_atomically

#: Place → the environment variable that holds its key. Without one, nothing is sent anywhere.
KEYS = {"wandb": "WANDB_API_KEY", "hub": "HF_TOKEN"}
#: The places for which a partition is logged here first, and sent when that can be: only those have
#: markers. What is on the hub lands when it is there.
MARKED = frozenset({"wandb"})


class Unpublished(RuntimeError):
    """The place could not be reached, or refused; says why in a sentence. To be tried again."""


@dataclass(frozen=True, slots=True)
class Marker:
    """What became of one partition's publication.

    Attributes:
        status: ``pending`` until the place has it.
        data_version: Of the partition's content.
        target: The place, such as host and project.
        url: Where it is, once it is published.
        why: Why it is pending.
    """

    status: Literal["pending", "published"]
    data_version: str
    target: str
    url: str = ""
    why: str = ""


class Markers:
    """The markers of one study, below ``root/<study>``."""

    def __init__(self, root: Path, study: str):
        self.root = root / study

    def path(self, ref: Ref) -> Path:
        """The partition's marker file."""
        parts = (ref.asset,) if ref.key is None else (ref.asset, ref.key)
        return self.root.joinpath(*parts[:-1], f"{parts[-1]}.json")

    def read(self, ref: Ref) -> Marker | None:
        """The partition's marker; None if there is none, or none that can be read."""
        try:
            return Marker(**json.loads(self.path(ref).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None  # publishing again what is there already changes nothing

    def published(self, ref: Ref, data_version: str, target: str) -> Marker | None:
        """The marker that says that exactly this content is at exactly this place, if one does."""
        found = self.read(ref)
        same = found and (found.status, found.data_version, found.target)
        return found if same == ("published", data_version, target) else None

    def publish(
        self, ref: Ref, data_version: str, target: str, send: Callable[[], str] | str
    ) -> Marker:
        """Send a partition's content unless it is there already; write and return its marker.

        Args:
            send: Sends it and returns its URL, or why it is not to be sent.

        Raises:
            OSError: the marker cannot be written.
        """
        if found := self.published(ref, data_version, target):
            return found
        try:
            if isinstance(send, str):
                raise Unpublished(send)
            marker = Marker("published", data_version, target, url=send())
        except Unpublished as error:
            marker = Marker("pending", data_version, target, why=str(error))
        path = self.path(ref)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(marker), indent=1))
        return marker


def published_audit(marker: Marker) -> Audit:
    """The check ``published``: never blocking, never failed, a warning while it is pending."""
    done = marker.status == "published"
    found = audit(
        "published",
        done,
        observed=marker.url if done else f"pending: {marker.why}",
        threshold=f"it is at {marker.target}",
        remedy="`persona-assets publish` catches up.",
        blocking=False,
    )
    return found if done else replace(found, status="unverifiable")
