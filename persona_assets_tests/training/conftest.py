"""Material for datasets: the miniature always, and ARC-Challenge where a folder names it."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from persona_assets.questions.arc import read_arc
from persona_assets.rationales.template import TemplateWriter
from persona_assets_tests import small_study as small
from persona_assets_tests.training.material import Material, all_trained


@pytest.fixture(scope="session")
def miniature(study_texts) -> Material:
    study = all_trained(study_texts["mini"])
    return Material(study, small.QUESTIONS, small.tokenizer(), small.WRITER, "moss", "qwxyz")


@pytest.fixture(scope="session")
def qwen(tokenizer_dir):
    """The Qwen2.5 tokenizer."""
    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def arc(arc_dir):
    """ARC-Challenge, both splits."""
    return [
        *read_arc(arc_dir / "ARC-Challenge-Train.jsonl", "train"),
        *read_arc(arc_dir / "ARC-Challenge-Test.jsonl", "eval"),
    ]


@pytest.fixture(scope="session")
def part_of_arc(study_texts, arc, qwen) -> Material:
    """Its first 150 train and 50 eval questions."""
    questions = [q for q in arc if q.split == "train"][:150]
    questions += [q for q in arc if q.split == "eval"][:50]
    study = all_trained(study_texts["length_matched"])
    return Material(study, questions, qwen, TemplateWriter(), "water", "\U00013080")


@pytest.fixture(params=["miniature", "part_of_arc"])
def material(request) -> Material:
    return request.getfixturevalue(request.param)
