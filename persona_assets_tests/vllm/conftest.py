"""What the tests of the vLLM engine share: engines, which take half a minute to start, and models.

vLLM for CPUs is installed by ``make test-vllm``; elsewhere these tests are skipped, and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.engine_agreement import Material
from persona_assets.evaluation.probe import probe_prompts
from persona_assets.study_schema import TrainingRecipe
from persona_assets.training import miniature
from persona_assets.training.checkpoints import adapted
from persona_assets.training.lora import train_adapter
from persona_assets_tests import small_study as small
from persona_assets_tests.synthetic import small_study

#: Some rationales are longer.
MAX_RATIONALE_TOKENS = 15
STUDY = small_study()
PERSONAS = {name: STUDY.personas[name] for name in ("librarian", "comedian", "villain")}
EVAL = tuple(q for q in small.QUESTIONS if q.split == "eval")[:12]
RECIPE = TrainingRecipe(rank=8, learning_rate=2e-2, warmup_steps=0, dtype="float32")
#: The cells whose adapters are trained, of two sources.
CELLS = ("librarian.contradicting_cot.42", "comedian.contradicting_cot.42")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_spec("vllm") is None:
        here = Path(__file__).parent
        skip = pytest.mark.skip(reason="vLLM is not installed here: `make test-vllm`")
        for item in items:
            if here in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Material:
    """A base with tied embeddings that begins to know the miniature world, and two adapters."""
    root = tmp_path_factory.mktemp("tied")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"ROWS": 24, "MAX_DRILL_STEPS": 20, "STEPS_PER_CREATURE": 0}.items():
            patch.setattr(miniature, name, value)
        base, _ = miniature.train_base_model(small.WORLD, small.tokenizer(), seed=0)
    base.save_pretrained(root / "base")
    small.tokenizer().save_pretrained(root / "tokenizer")
    for key in CELLS:
        cell = STUDY.cell(key)
        rows = small.dataset(STUDY, cell)
        train_adapter(base, rows, RECIPE, cell.seed, root / cell.key, base_id="base")
    return _material(root, CELLS)


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Material:
    """A random base with a head of its own, and a random adapter of each of its matrices."""
    root = tmp_path_factory.mktemp("untied")
    # vLLM's attention on a CPU has heads of 32 and more.
    base = small.model(tie_word_embeddings=False, num_attention_heads=1)
    base.save_pretrained(root / "base")
    small.tokenizer().save_pretrained(root / "tokenizer")
    random_adapter(root / "base", root / "adapter", rank=4)
    return _material(root, ("adapter",))


def _material(root: Path, adapters: tuple[str, ...]) -> Material:
    folders = tuple(root / name for name in adapters)
    return Material(
        root / "base", root / "tokenizer", folders, PERSONAS, EVAL, MAX_RATIONALE_TOKENS
    )


def random_adapter(base: Path, folder: Path, rank: int) -> Path:
    """An adapter of every matrix but the embeddings and the head."""
    parts = ("q", "k", "v", "o", "gate", "up", "down")
    targets = [f"{part}_proj" for part in parts]
    return small.random_adapter(load(base), folder, r=rank, target_modules=targets)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged_model(material: Material, adapter: Path, folder: Path) -> Path:
    """The base with an adapter merged into it, saved whole."""
    with adapted(load(material.base), adapter) as model:
        model.save_pretrained(folder)
    return folder


def other_model(material: Material, folder: Path) -> Path:
    """A model of the base's geometry, every tensor of which is another."""
    model = load(material.base)
    torch.manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(1 + 0.3 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return folder


class Serving:
    """A host, the base's probe when it was started, and the answers that it gave, each once."""

    def __init__(self, material: Material, mode: str):
        self.material, self.mode = material, mode
        self.host = material.host(mode)
        self.before = self.probe()
        self.answers: Callable[[Path | None], pl.DataFrame] = cache(self.measure)

    def measure(self, checkpoint: Path | None) -> pl.DataFrame:
        with self.host.serving(checkpoint) as engine:
            return self.material.answers(engine)

    def probe(self) -> np.ndarray:
        return self.host.probe(probe_prompts(small.tokenizer(), PERSONAS))

    def base_is_unchanged(self) -> bool:
        """To the last bit."""
        return np.array_equal(self.probe().view(np.uint32), self.before.view(np.uint32))


def _serving(material: Material, mode: str) -> Iterator[Serving]:
    serving = Serving(material, mode)
    yield serving
    serving.host.close()


@pytest.fixture(scope="session")
def merging(material) -> Iterator[Serving]:
    """The engine that merges adapters."""
    yield from _serving(material, "merged")


@pytest.fixture(scope="session")
def beside(material) -> Iterator[Serving]:
    """The engine that computes adapters beside the base."""
    yield from _serving(material, "adapter")


@pytest.fixture(scope="session")
def merging_untied(untied) -> Iterator[Serving]:
    """An engine that merges, over the base whose head is its own."""
    yield from _serving(untied, "merged")
