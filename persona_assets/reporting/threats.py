"""Threats to validity: what the study file implies, and what the checks found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from persona_assets.naming import listed
from persona_assets.reporting.ledger import Ledger
from persona_assets.reporting.printed import Code, Part, Printed, Quoted, Sentence
from persona_assets.reporting.queries import Row
from persona_assets.stats.comparability import KINDS, Confound
from persona_assets.stats.lexicon import lexicon_cells, undefined_because
from persona_assets.study import Study

#: Of a confound, the check's own findings: what a page quotes of the table ``checks``.
COMPARABLE = {"asset": "contrast_estimate", "check_name": "comparable"}


def threats(study: Study, ledger: Ledger, checks: Sequence[Row]) -> list[Sentence]:
    """The threats, those of the contrasts first.

    Args:
        study: The study.
        ledger: Its numbers.
        checks: The rows of the warehouse's table ``checks``.
    """
    return [
        *(_confounded(study, found) for found in found_confounds(study, checks)),
        *_of_the_design(study),
        *_warnings(ledger, checks),
    ]


def found_confounds(study: Study, checks: Sequence[Row]) -> list[Confound]:
    """What the checks of the contrasts found; contrasts that differ alike stand together."""
    details = {
        row["partition"]: json.loads(row["details"]).get("confounds", {})
        for row in checks
        if row["check_name"] == COMPARABLE["check_name"]
    }
    alike: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for contrast in study.contrast_list:
        for kind, differences in details.get(contrast.key, {}).items():
            alike.setdefault((kind, tuple(differences)), {})[contrast.name] = None
    found = [Confound(*difference, tuple(names)) for difference, names in alike.items()]
    return sorted(found, key=lambda confound: list(KINDS).index(confound.kind))


def _confounded(study: Study, found: Confound) -> Sentence:
    """A confound's sentence; what differs is quoted from the check of the first contrast."""
    names, said = found.phrase
    if not found.told:
        return (f"{names}: {said}.",)
    first = next(c for c in study.contrast_list if c.name == found.contrasts[0])
    key = COMPARABLE | {"partition": first.key, "confound": found.kind}
    details = "; ".join(found.differences)  # as in :func:`quoted_differences`
    return (f"{names}: {said} (", Quoted(details, "checks", "details", key), ").")


def _of_the_design(study: Study) -> Iterator[Sentence]:
    scaffold = study.inference.scaffold
    contrasted = dict.fromkeys(arm for c in study.contrast_list for arm in (c.a, c.b))
    tag = study.scaffold(scaffold).tag
    outside = [arm for arm in contrasted if study.arm(arm).scaffold.tag != tag]
    if outside:
        yield (
            f"All contrasts are measured under {scaffold}; the frame of some contrasted arms is "
            f"another one ({listed(outside)}): such an arm may leak less only because its own "
            "frame is absent.",
        )
    if study.cells_of("carry_over"):
        yield (
            "The training rows shown for carried-over arms are this study's own reference rows; "
            "what those checkpoints saw cannot be verified here.",
        )
        lexicon = [] if undefined_because(study) else lexicon_cells(study)
        if lexicon := [cell for cell in lexicon if cell.origin == "carry_over"]:
            arm = lexicon[0].arm
            yield (
                f"The lexicons of vocabulary leakage are made from {arm}'s reference rows: they "
                "are not the words that those checkpoints were trained on.",
            )
    spread = " The spread over seeds stands beside them." if len(study.seeds) > 1 else ""
    yield (
        "The intervals condition on these checkpoints: they cover neither the variation of "
        f"training seeds nor that of source personas.{spread}",
    )


def _warnings(ledger: Ledger, checks: Sequence[Row]) -> Iterator[Sentence]:
    """One sentence a check that some partition did not pass, the first such finding quoted.

    A contrast's ``comparable`` is told at length as a confound.
    """
    told: dict[tuple[str, str], Row] = {}
    for row in checks:
        if row["status"] != "passed" and row["check_name"] != COMPARABLE["check_name"]:
            told.setdefault((row["asset"], row["check_name"]), row)
    for (asset, name), row in told.items():
        parts: list[Part] = [f"{asset}, {name}: "]
        for i, status in enumerate(("failed", "unverifiable")):
            number = ledger[f"checks/{asset}/{name}/{status}"]
            parts += [" and " if i else "", Printed(number, "value", "count"), f" {status}"]
        key = {column: row[column] for column in ("asset", "partition", "check_name")}
        at = (Code(row["partition"]), ": ") if row["partition"] else ()
        observed = Quoted(row["observed"], "checks", "observed", key)
        yield (*parts, ". First: ", *at, observed, ".")


def quoted_differences(details: str, kind: str) -> str:
    """What a ``comparable`` check's details say of one kind of confound, as a page quotes it."""
    return "; ".join(json.loads(details).get("confounds", {}).get(kind, ()))
