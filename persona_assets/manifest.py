"""What has landed of a partition, and from what: its manifest, written last and read first."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from persona_assets.audit import Audit
from persona_assets.hashing import sha256_json, sha256_text

#: One part of a path in the store: no separator, no NUL, and nothing that leads upwards.
PLAIN = re.compile(r"(?!\.+$)[\w.+-]{1,200}", re.ASCII)
#: The field of a manifest's JSON with the hash of all others.
_SEAL = "sha256"


@dataclass(frozen=True, slots=True)
class Ref:
    """One partition of one asset; ``key`` is None for an unpartitioned asset."""

    asset: str
    key: str | None = None

    def __str__(self) -> str:
        return self.asset if self.key is None else f"{self.asset}[{self.key}]"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which run made a partition, from what, with what.

    Attributes:
        run_id: The Dagster run.
        inputs: Everything that decides the partition's content (see ``Freshness.inputs``): whole,
            not only its hash, so that what changed since can be named.
        study_hash: Content hash of the study file.
        software: Versions of the packages that the results depend on.
    """

    run_id: str
    inputs: dict[str, Any]
    study_hash: str
    software: dict[str, str] = field(default_factory=dict)

    @property
    def inputs_hash(self) -> str:
        """Hash of :attr:`inputs`."""
        return sha256_json(self.inputs)

    @property
    def upstream(self) -> dict[str, str]:
        """Data version of each upstream partition, by ``str(Ref)``."""
        return self.inputs["upstream"]

    @property
    def code_version(self) -> str:
        """The asset's code version."""
        return self.inputs["code_version"]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What landed: written last, read first.

    Attributes:
        ref: The partition.
        data_version: Hash of the content; equal content has an equal version.
        version: The folder the files are in: the hash of their names and bytes.
        files: SHA-256 and size in bytes of each file, by name.
        audits: What the asset's checks found.
        summary: A few values worth showing (row counts, seconds, …), JSON-representable.
        provenance: Which run made it, from what.
        landed_at: UTC, ISO 8601.
        released: Whether the files were removed after use (:meth:`Store.release`).
    """

    ref: Ref
    data_version: str
    version: str
    files: dict[str, dict[str, Any]]
    audits: tuple[Audit, ...]
    summary: dict[str, Any]
    provenance: Provenance
    landed_at: str
    released: bool = False

    @property
    def blocking_failures(self) -> tuple[Audit, ...]:
        """The audits on account of which consumers must refuse the partition."""
        return tuple(audit for audit in self.audits if audit.blocks)

    @property
    def findings(self) -> str:
        """Hash of what was checked of it, which is not its content."""
        return sha256_text(json.dumps(self.audits, sort_keys=True, default=_fields))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what :meth:`to_json` wrote.

        Raises:
            ValueError, TypeError, KeyError, AttributeError, RecursionError: it is no manifest, or
                names files outside its partition's folder, or is not as it was written.
        """
        raw = json.loads(text)
        written = raw.pop(_SEAL, None)  # those of earlier releases have none
        found = _seal(raw)
        manifest = cls(
            **{
                **raw,
                "ref": Ref(**raw["ref"]),
                "audits": tuple(Audit.from_json(audit) for audit in raw["audits"]),
                "provenance": Provenance(**raw["provenance"]),
            }
        )
        for part in (manifest.version, *(p for name in manifest.files for p in name.split("/"))):
            if not PLAIN.fullmatch(part):
                raise ValueError(f"{part!r} is no part of a path in it")
        for name, entry in manifest.files.items():
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"no size and hash of {name}")
        if type(manifest.provenance.inputs) is not dict or type(manifest.summary) is not dict:
            raise ValueError("no inputs, or no summary")
        if written not in (None, found):
            raise ValueError(f"its content has SHA-256 {found}, written was {written}")
        return manifest

    def to_json(self) -> str:
        """The manifest as indented JSON with sorted keys, and the hash of all that in it."""
        raw = json.loads(json.dumps(asdict(self)))  # as it is read again
        raw[_SEAL] = _seal(raw)
        return json.dumps(raw, indent=1, sort_keys=True, ensure_ascii=False)


def _fields(value: Any) -> dict[str, Any]:
    """A dataclass's fields: as ``asdict`` in JSON, without its copies of all that is in them."""
    return {field.name: getattr(value, field.name) for field in fields(value)}


def _seal(raw: dict[str, Any]) -> str:
    """The hash of a manifest's JSON: a changed digit of it is still JSON."""
    return sha256_text(json.dumps(raw, sort_keys=True))
