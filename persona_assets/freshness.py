"""What has landed and is up to date, and for what is not, why."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from persona_assets.graph import Graph
from persona_assets.hashing import as_json
from persona_assets.store import Manifest, Ref, Store, StoreError, StoreUnreachable

#: Partitions that are worth a look at the whole store.
_MANY = 100

#: fresh: landed from what it would be made from now; stale: landed from something else;
#: failed: landed, and a blocking check of it failed; missing: not landed, or damaged, or its files
#: were released after use and are needed again.
State = Literal["fresh", "stale", "failed", "missing"]


@dataclass
class Freshness:
    """Which partitions are landed and up to date, as of when it was asked first.

    Answers are kept, so that a question about the whole study reads each manifest once: make a
    new one after something has landed.
    """

    graph: Graph
    store: Store

    def __post_init__(self) -> None:
        self._states: dict[Ref, tuple[State, str]] = {}
        self._manifests: dict[Ref, Manifest | None] = {}
        self._damage: dict[Ref, str] = {}
        self._blockers: dict[Ref, dict[Ref, str]] = {}

    def manifest(self, ref: Ref) -> Manifest | None:
        """The partition's manifest, read once; None if it has not landed or is damaged."""
        if ref not in self._manifests:
            self._manifests[ref], self._damage[ref] = self._read(ref, self.store)
        return self._manifests[ref]

    def ever_landed(self, ref: Ref) -> bool:
        """Whether there is a manifest of the partition, be it damaged or of damaged files."""
        return self.manifest(ref) is not None or self._damage[ref] != _not_landed(ref)

    def read_ahead(self, ref: Ref | None = None) -> Freshness:
        """Read the manifests of all that a partition is made from, many at once; itself.

        That is all that its state depends on; by default, the manifests of the whole study.
        """
        wanted = self.graph.refs if ref is None else self.graph.made_from(ref)
        refs = [ref for ref in wanted if ref not in self._manifests]
        store = self.store.survey() if len(refs) > _MANY else self.store
        with ThreadPoolExecutor(store.at_once) as pool:
            read = pool.map(lambda ref: self._read(ref, store), refs)
            for ref, found in zip(refs, read, strict=True):
                self._manifests[ref], self._damage[ref] = found
        return self

    def _read(self, ref: Ref, store: Store) -> tuple[Manifest | None, str]:
        try:
            manifest = store.manifest(ref)
        except StoreUnreachable:
            raise  # what may have landed must not be made again
        except StoreError as error:
            return None, str(error)
        if manifest is None:
            return None, _not_landed(ref)
        damage = store.damage(manifest)
        return (None, f"{ref} is damaged: {damage}") if damage else (manifest, "")

    def state(self, ref: Ref) -> State:
        """The partition's state."""
        return self._state(ref)[0]

    def why(self, ref: Ref) -> str:
        """The state in words: for a stale partition, what changed."""
        return self._state(ref)[1]

    def reasons(self, ref: Ref) -> list[str]:
        """Everything on account of which a partition is not fresh, one line each.

        Its own changed inputs come first, then what is not fresh above it, by its roots.
        """
        manifest, roots = self.manifest(ref), self.blockers(ref)
        if manifest is None:
            return [self._damage[ref], *roots.values()]
        missing = any(self.manifest(upstream) is None for upstream in self.graph.upstream(ref))
        changed = [] if missing else self.changes(ref)
        failed = [
            f"its blocking check {audit.name} failed: {audit.observed}; {audit.remedy}"
            for audit in manifest.blocking_failures
        ]
        return [*changed, *roots.values(), *failed]

    def blockers(self, ref: Ref) -> dict[Ref, str]:
        """What must be made before ``ref`` can be, and why: the roots of what is not fresh."""
        if ref not in self._blockers:
            found: dict[Ref, str] = {}
            for upstream in self.graph.upstream(ref):
                if self.state(upstream) != "fresh":
                    found |= self.blockers(upstream) or {upstream: self.why(upstream)}
            self._blockers[ref] = found
        return self._blockers[ref]

    def waits_for(self, refs: Collection[Ref]) -> dict[Ref, str]:
        """What must be made before ``refs`` can be made together, upstream first, and why."""
        seen, found, above = set(refs), [], list(refs)
        while above:
            for upstream in self.graph.upstream(above.pop()):
                if upstream not in seen and self.state(upstream) != "fresh":
                    seen.add(upstream)
                    above.append(upstream)
                    found.append(upstream)
        places = {ref: i for i, ref in enumerate(self.graph.refs)}
        return {ref: self.why(ref) for ref in sorted(found, key=places.__getitem__)}

    def inputs(self, ref: Ref, beside: Collection[Ref] = ()) -> dict[str, Any]:
        """What a partition would be made from now, less the partitions made ``beside`` it.

        Raises:
            KeyError: an upstream partition has not landed.
        """
        asset = self.graph.assets[ref.asset]
        return {
            "code_version": asset.code_version,
            "settings": as_json(asset.settings(ref.key)),
            "sources": asset.sources(ref.key),
            "upstream": self.upstream_versions(ref, beside),
        }

    def upstream_versions(self, ref: Ref, beside: Collection[Ref] = ()) -> dict[str, str]:
        """Data version of each upstream partition but those ``beside``, by ``str(Ref)``.

        For an asset that quotes what was checked of its upstream, with the hash of that.

        Raises:
            KeyError: an upstream partition has not landed.
        """
        versions, quotes = {}, self.graph.assets[ref.asset].quotes_checks
        for upstream in self.graph.upstream(ref):
            if upstream in beside:
                continue
            manifest = self.manifest(upstream)
            if manifest is None:
                raise KeyError(str(upstream))
            version = manifest.data_version
            if quotes:
                version += f"+{manifest.findings[:16]}"
            versions[str(upstream)] = version
        return versions

    def changes(self, ref: Ref) -> list[str]:
        """What a landed partition was made from and would not be now, each named, was and is.

        Raises:
            StoreError: it has not landed.
            KeyError: an upstream partition has not landed.
        """
        was = self.store.landed(ref).provenance.inputs
        return list(_differences(was, self.inputs(ref)))

    def _state(self, ref: Ref) -> tuple[State, str]:
        if ref not in self._states:
            found = self._look(ref)
            # Looking at what was released looks at its reader too, which may be this partition.
            self._states.setdefault(ref, found)
        return self._states[ref]

    def _look(self, ref: Ref) -> tuple[State, str]:
        manifest = self.manifest(ref)
        if manifest is None:
            return "missing", self._damage[ref]
        for upstream in self.graph.upstream(ref):
            state, why = self._state(upstream)
            if state != "fresh":
                return "stale", why
        if self.inputs(ref) != manifest.provenance.inputs:
            first, *more = self.changes(ref)
            others = f" and {len(more)} more" if more else ""
            return "stale", f"{ref} was made from other inputs: {first}{others}"
        if manifest.blocking_failures:
            names = ", ".join(audit.name for audit in manifest.blocking_failures)
            return "failed", f"{ref} failed its blocking checks: {names}"
        return self._look_at_reader(ref) if manifest.released else ("fresh", f"{ref} is up to date")

    def _look_at_reader(self, ref: Ref) -> tuple[State, str]:
        """Of a released partition that is up to date: whether its files are needed again."""
        gone = f"the files of {ref} were removed after use"
        reader = self.graph.assets[ref.asset].released_after(ref.key)
        if reader is None:
            return "missing", f"{gone}, and the study keeps them now"
        self._states[ref] = "fresh", f"{ref} is up to date; its files were removed after use"
        if self.state(reader) == "fresh":
            return self._states[ref]
        del self._states[ref]
        return "missing", f"{gone}, and {reader} needs them again"


def _not_landed(ref: Ref) -> str:
    return f"{ref} has not landed"


def _differences(was: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """The leaves in which two JSON values differ, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key) or (key in was) != (key in now):
                yield from _differences(was.get(key), now.get(key), (*path, key))
    elif path and isinstance(was, list) and isinstance(now, list):
        yield from _list_differences(was, now, path)
    else:
        yield _difference(was, now, *path)


def _list_differences(was: list, now: list, path: tuple[str, ...]) -> Iterator[str]:
    """By name where the items have names; else what came and what went."""
    if all(isinstance(item, dict) and "name" in item for item in (*was, *now)):
        ours, theirs = ({item["name"]: item for item in items} for items in (was, now))
        if ours != theirs:
            yield from _differences(ours, theirs, path)
            return
    came, went = [x for x in now if x not in was], [x for x in was if x not in now]
    words = [
        f"{verb} {_shown(items)}" for verb, items in (("gained", came), ("lost", went)) if items
    ]
    yield f"{'.'.join(path[1:])} {' and '.join(words) or 'is in another order'}"


def _difference(was: Any, now: Any, kind: str, *path: str) -> str:
    name = ".".join(path)
    if kind == "upstream":
        if not (was and now):
            return f"{name} {_came_or_went(was)}"
        same = was.partition("+")[0] == now.partition("+")[0]
        return f"{name} has other {'findings of its checks' if same else 'content'}"
    if kind == "sources":
        return f"the source of {name} {'changed' if was and now else _came_or_went(was)}"
    return f"{name or kind} was {_shown(was)} and is {_shown(now)}"


def _came_or_went(was: Any) -> str:
    return "is no longer an input" if was else "is a new input"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
