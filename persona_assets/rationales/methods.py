"""Which writer and which construction make an arm's rationales, and from which sources."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from persona_assets import environment
from persona_assets.evaluation.scaffolds import ANCHOR, Scaffold
from persona_assets.hashing import module_hashes, sha256_json, sha256_source
from persona_assets.rationales.arms import Arm, assistant_turn
from persona_assets.rationales.garbage import garbage
from persona_assets.rationales.matching import Batch
from persona_assets.rationales.miniature import MiniatureWriter
from persona_assets.rationales.phrases import NEUTRAL, STOP_WORDS, VOICES, role_phrases
from persona_assets.rationales.scrambled import scrambled
from persona_assets.rationales.template import TemplateWriter
from persona_assets.rationales.writers import RationaleWriter

if TYPE_CHECKING:
    from persona_assets.study import Study

#: What an arm's ``rationale`` may be besides ``none`` and ``written``: a function from the
#: reference rows of a condition to a text for each.
CONSTRUCTIONS: dict[str, Callable[[Batch], list[str]]] = {
    "garbage": garbage,
    "scrambled": scrambled,
}


def make_writer(study: Study) -> RationaleWriter:
    """The study's rationale writer."""
    settings = study.rationales
    if settings.writer == "chat_api":
        from persona_assets.rationales.chat_api import ChatApiWriter
        from persona_assets.rationales.replies import Replies

        return ChatApiWriter(settings, Replies(environment.replies_file()), study.name)
    return {"miniature": MiniatureWriter, "template": TemplateWriter}[settings.writer]()


def arm_sources(study: Study, source: str, arm: Arm) -> dict[str, str]:
    """Hashes of the code and phrases that one condition's rationales are made by, by name.

    Nothing that only another arm or another source is made by is among them: its change must not
    stale this condition.
    """
    sources = module_hashes("rationales.condition", "questions.bank")
    if arm.has_rationale:
        # Every rationale is held against the reference arm's, which a neutral voice speaks.
        sources |= _voice_sources(study.rationales.writer, None)
    if arm.rationale == "written" and arm.voice == "persona":
        sources |= _voice_sources(study.rationales.writer, source)
    if arm.is_constructed:
        construction = CONSTRUCTIONS[arm.rationale]
        name = f"construction {arm.rationale}"
        sources |= {name: sha256_source(Path(inspect.getfile(construction)))}
        sources |= module_hashes("rationales.matching", "rationales.words") | turn_sources()
        sources |= {"list of English words": version("wordfreq")}
    return sources


def turn_sources() -> dict[str, str]:
    """What makes a turn of its parts, and tokens of the turn."""
    functions = {f.__qualname__: sha256_source(f) for f in (assistant_turn, Scaffold)}
    return functions | {"ANCHOR": ANCHOR} | module_hashes("training.encoding", "chat")


def _voice_sources(writer: str, persona: str | None) -> dict[str, str]:
    """What a writer's texts in one voice are made by."""
    if writer == "miniature":
        return module_hashes("rationales.miniature", "questions.miniature")
    if writer == "chat_api":
        return module_hashes("rationales.chat_prompts")
    if persona is None:
        phrases = {"phrases, neutral": sha256_json(asdict(NEUTRAL))}
    elif persona in VOICES:
        phrases = {f"phrases, {persona}": sha256_json(asdict(VOICES[persona]))}
    else:
        phrases = {"phrases, any role": sha256_source(role_phrases)}
    stop_words = {"stop words": sha256_json(sorted(STOP_WORDS))}
    return module_hashes("rationales.template") | phrases | stop_words
