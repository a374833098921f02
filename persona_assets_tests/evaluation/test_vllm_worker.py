"""The tensors that vLLM's worker loads: the base's, with what an adapter adds to them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from persona_assets.evaluation.engines.vllm_worker import (
    ModelFiles,
    adapted_tensors,
    modules_of,
    tensor_names,
)
from persona_assets.training.checkpoints import adapted, matrix_shapes, read_updates
from persona_assets_tests import small_study as small

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base in one file and in several, and an adapter of some of its modules."""
    root = tmp_path_factory.mktemp("worker")
    model = small.model(tie_word_embeddings=False)
    for tensor in model.parameters():
        if tensor.ndim == 1:  # biases are zeros at first
            torch.nn.init.normal_(tensor)
    model.save_pretrained(root / "one")
    model.save_pretrained(root / "several", max_shard_size="30KB")
    targets = ["q_proj", "v_proj", "down_proj"]
    small.random_adapter(model, root / "adapter", r=3, lora_alpha=5, target_modules=targets)
    return root


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_a_models_tensors_are_read_from_one_file_or_several(folder):
    assert len(list((folder / "several").glob("*.safetensors"))) > 2
    expected = weights(folder / "one")
    for name in ("one", "several"):
        files = ModelFiles(folder / name)
        assert set(files) == set(expected)
        assert all(torch.equal(files[tensor], expected[tensor]) for tensor in expected)
        assert "lm_head.weight" in files
        assert "model.nothing" not in files


def test_tensors_of_a_file_come_one_after_the_other(folder):
    """So that a large model is read file by file."""
    files = ModelFiles(folder / "several")
    paths = [files._files[name] for name in files]
    assert len(list(itertools.groupby(paths))) == len(set(paths))


def test_fused_modules_are_named_once_with_all_their_parts():
    attention = f"{LAYER}.self_attn"
    targets = [f"{attention}.v_proj", f"{attention}.q_proj", f"{attention}.o_proj", "lm_head"]
    assert modules_of([*targets, f"{LAYER}.mlp.up_proj"], FUSED) == {
        f"{attention}.qkv_proj": tuple(f"{attention}.{part}_proj" for part in "qkv"),
        f"{attention}.o_proj": (f"{attention}.o_proj",),
        "lm_head": ("lm_head",),
        f"{LAYER}.mlp.gate_up_proj": (f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"),
    }
    assert modules_of([f"{attention}.q_proj"], {}) == {
        f"{attention}.q_proj": (f"{attention}.q_proj",)
    }


def test_biases_are_loaded_where_there_are_any(folder):
    parts = [f"{LAYER}.self_attn.{name}_proj" for name in "qo"]
    q, o = parts
    names = tensor_names(parts, ModelFiles(folder / "one"))
    assert names == [f"{q}.weight", f"{q}.bias", f"{o}.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_loaded_is_what_transformers_merges(folder, dtype):
    """To the last bit, in both dtypes, untouched tensors and biases included."""
    files = ModelFiles(folder / "several")
    updates = read_updates(folder / "adapter", matrix_shapes(folder / "one"))
    assert len(updates) == 6
    loaded = dict(adapted_tensors(files, files, updates, "cpu", dtype))
    base = AutoModelForCausalLM.from_pretrained(folder / "one", dtype=dtype)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with adapted(base, folder / "adapter") as merged:
        expected = merged.state_dict()
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    changed = {name for name in before if not torch.equal(loaded[name], before[name])}
    assert changed == {f"{target}.weight" for target in updates}
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}
    restored = dict(adapted_tensors(files, files, {}, "cpu", dtype))
    assert all(torch.equal(restored[name], before[name]) for name in before)


def test_an_update_is_the_scaled_product_rounded_once(folder):
    updates = read_updates(folder / "adapter", matrix_shapes(folder / "one"))
    update = updates[f"{LAYER}.mlp.down_proj"]
    assert (update.b.shape, update.a.shape) == ((32, 3), (3, 64))
    assert update.scaling == 5 / 3
    weight = weights(folder / "one")[f"{LAYER}.mlp.down_proj.weight"]
    exact = weight.double() + (update.b.double() @ update.a.double()) * (5 / 3)
    assert torch.allclose(update.added_to(weight).double(), exact, atol=1e-6)
    half = weight.to(torch.bfloat16)
    sum_of_half = half.float() + update.b @ update.a * (5 / 3)
    assert torch.equal(update.added_to(half), sum_of_half.to(torch.bfloat16))


def test_the_tests_of_vllm_are_skipped_with_a_reason_where_it_is_missing(monkeypatch):
    from persona_assets_tests.vllm import conftest

    class Item:
        def __init__(self, path):
            self.path, self.reasons = Path(path), []

        def add_marker(self, mark):
            assert mark.name == "skip"
            self.reasons.append(mark.kwargs["reason"])

    theirs, other = Item(Path(conftest.__file__).with_name("test_host.py")), Item(__file__)
    monkeypatch.setattr(conftest, "find_spec", lambda name: name == "vllm")
    conftest.pytest_collection_modifyitems([theirs, other])
    assert theirs.reasons == []
    monkeypatch.setattr(conftest, "find_spec", lambda name: None)
    conftest.pytest_collection_modifyitems([theirs, other])
    assert theirs.reasons == ["vLLM is not installed here: `make test-vllm`"]
    assert other.reasons == []
