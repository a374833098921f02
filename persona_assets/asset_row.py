"""What one row of the graph table says of an asset, and what a job is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from persona_assets.store import Ref

Keys = tuple[str, ...] | None


@dataclass(frozen=True)
class Asset:
    """One asset of a study.

    Attributes:
        name: The asset's name (its Dagster key is ``<study>/<name>``).
        group: The Dagster group.
        kinds: Dagster's kind tags.
        description: What a partition holds.
        keys: Its partition keys, or None if it is not partitioned.
        upstream: Key → the partitions that the partition is made from.
        settings: Key → the slice of the study that it is made from (JSON-representable).
        sources: Key → hashes of the source of functions and modules that this partition is made
            by, by name; shared machinery is covered by ``code_version``.
        code_version: To be raised when the asset's shared machinery gives other results.
        quotes_checks: Whether it quotes what was checked of its upstream: it is then made again
            when that is another finding, though the content is the same.
        released_after: Key → the partition that is the last to read this one's files, where the
            study has them removed after that.
    """

    name: str
    group: str
    kinds: frozenset[str]
    description: str
    keys: Keys
    upstream: Callable[[str | None], tuple[Ref, ...]]
    settings: Callable[[str | None], Any] = lambda key: None
    sources: Callable[[str | None], dict[str, str]] = lambda key: {}
    code_version: str = "1"
    quotes_checks: bool = False
    released_after: Callable[[str | None], Ref | None] = lambda key: None

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(self.keys or ())

    def has(self, key: str | None) -> bool:
        """Whether one of its partitions has that key."""
        return key in self._keys

    def refs(self) -> tuple[Ref, ...]:
        """All of the asset's partitions."""
        return (
            (Ref(self.name),) if self.keys is None else tuple(Ref(self.name, k) for k in self.keys)
        )


@dataclass(frozen=True, slots=True)
class Job:
    """Assets that one Dagster run materializes, for one partition."""

    assets: tuple[str, ...]
    description: str
