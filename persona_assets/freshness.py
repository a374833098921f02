"""What has landed and is up to date, and for what is not, why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from persona_assets.graph import Graph
from persona_assets.hashing import sha256_json
from persona_assets.store import Manifest, Ref, Store, StoreError

#: fresh: landed from what it would be made from now; stale: landed from something else;
#: failed: landed, and a blocking check of it failed; missing: not landed, or damaged.
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

    def manifest(self, ref: Ref) -> Manifest | None:
        """The partition's manifest, read once; None if it has not landed or is damaged."""
        if ref not in self._manifests:
            self._manifests[ref], self._damage[ref] = self._read(ref)
        return self._manifests[ref]

    def _read(self, ref: Ref) -> tuple[Manifest | None, str]:
        try:
            manifest = self.store.manifest(ref)
        except StoreError as error:
            return None, str(error)
        if manifest is None:
            return None, f"{ref} has not landed"
        damage = self.store.damage(manifest)
        return (None, f"{ref} is damaged: {damage}") if damage else (manifest, "")

    def state(self, ref: Ref) -> State:
        """The partition's state."""
        return self._state(ref)[0]

    def why(self, ref: Ref) -> str:
        """The state in words: for a stale partition, what changed."""
        return self._state(ref)[1]

    def blockers(self, ref: Ref) -> dict[Ref, str]:
        """What must be made before ``ref`` can be, and why: the roots of what is not fresh."""
        found: dict[Ref, str] = {}
        for upstream in self.graph.upstream(ref):
            if self.state(upstream) != "fresh":
                found |= self.blockers(upstream) or {upstream: self.why(upstream)}
        return found

    def inputs(self, ref: Ref) -> dict[str, Any]:
        """What a partition would be made from now: hashed by :meth:`inputs_hash`.

        Raises:
            KeyError: an upstream partition has not landed.
        """
        asset = self.graph.assets[ref.asset]
        return {
            "code_version": asset.code_version,
            "settings": asset.settings(ref.key),
            "methods": list(asset.methods(ref.key)),
            "upstream": self.upstream_versions(ref),
        }

    def upstream_versions(self, ref: Ref) -> dict[str, str]:
        """Data version of each upstream partition, by ``str(Ref)``.

        Raises:
            KeyError: an upstream partition has not landed.
        """
        versions = {}
        for upstream in self.graph.upstream(ref):
            manifest = self.manifest(upstream)
            if manifest is None:
                raise KeyError(str(upstream))
            versions[str(upstream)] = manifest.data_version
        return versions

    def inputs_hash(self, ref: Ref) -> str:
        """Hash of :meth:`inputs`."""
        return sha256_json(self.inputs(ref))

    def _state(self, ref: Ref) -> tuple[State, str]:
        if ref not in self._states:
            self._states[ref] = self._look(ref)
        return self._states[ref]

    def _look(self, ref: Ref) -> tuple[State, str]:
        manifest = self.manifest(ref)
        if manifest is None:
            return "missing", self._damage[ref]
        for upstream in self.graph.upstream(ref):
            state, why = self._state(upstream)
            if state != "fresh":
                return "stale", why
        if self.inputs_hash(ref) != manifest.provenance.inputs_hash:
            return "stale", f"{ref} was made from other {self._changed(ref, manifest)}"
        if manifest.blocking_failures:
            names = ", ".join(audit.name for audit in manifest.blocking_failures)
            return "failed", f"{ref} failed its blocking checks: {names}"
        return "fresh", f"{ref} is up to date"

    def _changed(self, ref: Ref, manifest) -> str:
        now, then = self.upstream_versions(ref), manifest.provenance.upstream
        changed = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
        if manifest.provenance.code_version != self.graph.assets[ref.asset].code_version:
            changed.append("code_version")
        return ", ".join(changed) or "settings of the study file or functions of its arm"
