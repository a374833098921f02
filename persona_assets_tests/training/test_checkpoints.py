"""Adapters on disk: what is refused before loading, and the base that one is lent to."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_assets.study import TrainingRecipe
from persona_assets.training.checkpoints import (
    CheckpointError,
    adapted,
    adapter_hash,
    check_adapter,
    fits_base,
    is_adapter,
    read_header,
)
from persona_assets.training.lora import train_adapter
from persona_assets.training.resident import linear_shapes
from persona_assets_tests import small_study as small
from persona_assets_tests.training.test_lora import same, state

RECIPE = TrainingRecipe(rank=4, learning_rate=5e-3, warmup_steps=0, dtype="float32")
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def trained(mini, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    rows = small.dataset(mini, mini.cell("librarian.garbage_cot.42"))
    train_adapter(small.model(), rows, RECIPE, 42, folder, base_id="small")
    return folder


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def reconfigure(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def retensor(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def logits(model) -> torch.Tensor:
    return model(torch.arange(24)[None]).logits


def test_the_adapter_changes_the_model_and_the_base_comes_back(adapter):
    model = small.model()
    before, base = state(model), logits(model)
    unmerged = logits(PeftModel.from_pretrained(small.model(), str(adapter)))
    with adapted(model, adapter) as lent:
        merged = logits(lent)
    # Merging rounds each weight once more: float32 noise, far below the adapter's own effect.
    assert torch.allclose(merged, unmerged, atol=1e-4)
    assert (merged - base).abs().max() > 0.05
    assert same(model, before)
    assert torch.equal(logits(model), base)
    assert not hasattr(model, "peft_config")


def test_the_base_comes_back_from_an_error_in_use_or_in_loading(adapter, monkeypatch):
    model = small.model()
    before = state(model)
    with pytest.raises(ZeroDivisionError), adapted(model, adapter):
        raise ZeroDivisionError
    assert same(model, before)

    def fail(self, *_, **__):
        raise RuntimeError("half merged")

    monkeypatch.setattr("peft.PeftModelForCausalLM.merge_and_unload", fail, raising=False)
    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", fail)
    with pytest.raises(RuntimeError, match="half merged"), adapted(model, adapter):
        pass
    assert same(model, before)


def test_adapters_follow_each_other_on_one_base(adapter, tmp_path):
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    retensor(other, lambda tensors: tensors[LORA_A].mul_(-1))
    model = small.model()
    with adapted(model, adapter) as lent:
        first = logits(lent)
    with adapted(model, other) as lent:
        assert not torch.equal(logits(lent), first)
    with adapted(model, adapter) as lent:
        assert torch.equal(logits(lent), first)


def test_the_hash_covers_both_files(adapter):
    assert is_adapter(adapter)
    before = adapter_hash(adapter)
    (adapter / "training_log.json").write_text("{}")
    assert adapter_hash(adapter) == before
    reconfigure(adapter, lora_alpha=33)
    assert adapter_hash(adapter) != before
    (adapter / "adapter_config.json").unlink()
    assert not is_adapter(adapter)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: is missing"):
        adapter_hash(adapter)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type: found IA3, expected LORA"),
        ({"r": "4"}, "r: found 4, expected a rank"),
        ({"r": True}, "r: found True, expected a rank"),
        ({"lora_alpha": None}, "lora_alpha: found None, expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan, expected a finite number"),
        ({"target_modules": "all-linear"}, "target_modules: found all-linear, expected a list"),
        ({"use_dora": True}, "use_dora: found True, expected False, as in plain LoRA"),
        ({"bias": "all"}, "bias: found all, expected none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: found"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern: found"),
        ({"r": 8}, "expected 8×32, found 4×32"),
        ({"target_modules": ["q_proj"]}, "expected no such tensor, found 4×32"),
        ({"target_modules": ["q_proj", "up_proj"]}, "expected"),
    ],
)
def test_a_foreign_configuration_is_refused(adapter, changes, says):
    reconfigure(adapter, **changes)
    model = small.model()
    before = state(model)
    with pytest.raises(CheckpointError) as error, adapted(model, adapter):
        pass
    assert says in str(error.value)
    assert str(adapter) in str(error.value)
    assert same(model, before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(LORA_A), f"tensor {LORA_A}: expected 4×32, found no such tensor"),
        (lambda t: t.update({LORA_A: torch.zeros(4, 33)}), "expected 4×32, found 4×33"),
        (lambda t: t.update(stray=torch.zeros(2)), "stray: expected no such tensor, found 2"),
        (lambda t: t.update({LORA_A: torch.zeros(4, 32).int()}), "is not a F32, F16, BF16 tensor"),
        (lambda t: t[LORA_A].fill_(float("inf")), f"tensor {LORA_A} is not finite"),
    ],
)
def test_foreign_tensors_are_refused(adapter, change, says):
    retensor(adapter, change)
    with pytest.raises(CheckpointError) as error, adapted(small.model(), adapter):
        pass
    assert says in str(error.value)


def test_pickles_are_refused_even_beside_an_adapter(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: pickled weights are never"):
        check_adapter(adapter, linear_shapes(small.model()))


def test_cut_off_and_padded_files_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    data = path.read_bytes()
    for spoiled in (data[:-1], data + b"\0", data[:100], b"", struct.pack("<Q", 2**60) + b"{}"):
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match="fetch or train it again"):
            check_adapter(adapter, linear_shapes(small.model()))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=64)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "t"]), inner
            )
        ),
        max_leaves=8,
    ).map(lambda v: (lambda h: struct.pack("<Q", len(h)) + h)(json.dumps(v).encode()))
)
def test_any_bytes_are_a_header_or_refused(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert isinstance(found, dict)


def test_the_fit_to_a_base_on_disk_is_audited(adapter, tmp_path):
    base = tmp_path / "base"
    small.model().save_pretrained(base)
    passed = fits_base(adapter, base)
    assert (passed.name, passed.status) == ("adapter_fits_base", "passed")
    assert passed.observed.startswith("8 modules adapted")
    reconfigure(adapter, r=8)
    failed = fits_base(adapter, base)
    assert failed.blocks
    assert "expected 8×32, found 4×32" in failed.observed
