"""Adapters on disk: what is refused before loading, and the base that one is lent to."""

from __future__ import annotations

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file

from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.checkpoints import (
    adapted,
    adapter_hash,
    check_adapter,
    checkpoint_hash,
    fits_base,
    is_adapter,
)
from persona_assets.training.headers import CheckpointError, read_header
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

    merging, changed = torch.Tensor.copy_, []

    def fail(self, other):
        merging(self, other)
        changed.append(not same(model, before))
        if len(changed) == 3:
            raise RuntimeError("half merged")

    monkeypatch.setattr("torch.Tensor.copy_", fail)
    with pytest.raises(RuntimeError, match="half merged"), adapted(model, adapter):
        pass
    assert all(changed[:3])
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


@pytest.mark.parametrize("rslora", [False, True])
def test_merging_is_what_peft_computes(adapter, rslora):
    """Bit for bit in float32, for both scalings."""
    reconfigure(adapter, use_rslora=rslora, lora_alpha=7)
    theirs = PeftModel.from_pretrained(small.model(), str(adapter)).merge_and_unload()
    with adapted(small.model(), adapter) as ours:
        assert same(ours, state(theirs))


def test_merging_into_bfloat16_rounds_once(adapter):
    model, whole = small.model().to(torch.bfloat16), small.model().to(torch.bfloat16).float()
    with adapted(model, adapter) as lent, adapted(whole, adapter) as reference:
        assert same(lent, state(reference.to(torch.bfloat16)))


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
        ({"r": 10**400}, "r: found 1000"),
        ({"lora_alpha": 10**400}, "lora_alpha: found 1000"),
        ({"target_modules": ["q_proj"] * 10_001}, "target_modules: found ['q_proj', "),
        ({"r": True}, "r: found True, expected a rank"),
        ({"lora_alpha": None}, "lora_alpha: found None, expected a number above"),
        ({"lora_alpha": 0}, "lora_alpha: found 0, expected a number above 0 and below"),
        ({"lora_alpha": -8}, "lora_alpha: found -8, expected a number above 0 and below"),
        ({"use_rslora": "yes"}, "use_rslora: found yes, expected true or false"),
        ({"task_type": "SEQ_CLS"}, "task_type: found SEQ_CLS, expected CAUSAL_LM"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: found pissa, expected True, as in"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: found olora"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "megatron_config: found"),
        ({"megatron_core": "os"}, "megatron_core: found os, expected megatron.core"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: found [1], expected None"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config: found"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: found"),
        ({"layers_to_transform": [0]}, "layers_to_transform: found [0]"),
        ({"auto_map": {"AutoModel": "x.X"}}, "auto_map: found {'AutoModel': 'x.X'}, expected None"),
        ({"trust_remote_code": True}, "trust_remote_code: found True, expected None"),
        ({"option_of_a_later_version": 1}, "option_of_a_later_version: found 1, expected None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: found nan, expected a number above"),
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


@pytest.mark.parametrize(
    ("shape", "span"),
    [
        ([2**41], [0, 2**43]),
        ([1] * 9, [0, 4]),
        ([10**4000] * 2000, [0, 0]),  # whose product takes minutes
        ([-1], [0, 0]),
        ([4], [4, 20]),
        ([2], [0, 9]),
    ],
)
def test_a_tensor_that_cannot_be_is_refused_at_once(tmp_path, shape, span):
    path = tmp_path / "x.safetensors"
    head = json.dumps({"t": {"dtype": "F32", "shape": shape, "data_offsets": span}}).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(16))
    began = time.process_time()
    with pytest.raises(CheckpointError, match="tensor t: "):
        read_header(path)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "head",
    [
        b'{"__metadata__": {}, "__metadata__": {}}',
        '{"__metadata__": {}}'.encode("utf-16"),
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_a_header_that_libraries_read_otherwise_is_refused(tmp_path, head):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_header(path)


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


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    small.model().save_pretrained(folder)
    return folder


@pytest.fixture
def merged(tmp_path) -> Path:
    """Another whole model of the base's kind, in two files or more."""
    folder = tmp_path / "merged"
    small.model(1).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def fault(folder: Path, base: Path, form=None) -> str:
    """What a failed audit of the folder says."""
    found = fits_base(folder, base, form)
    assert (found.name, found.status, found.blocks) == ("checkpoint_fits_base", "failed", True)
    return found.observed


def test_an_adapters_fit_to_a_base_on_disk_is_audited(adapter, base):
    passed = fits_base(adapter, base, "adapter")
    assert (passed.name, passed.status) == ("checkpoint_fits_base", "passed")
    assert passed.observed.startswith("8 modules adapted")
    reconfigure(adapter, r=8)
    assert "expected 8×32, found 4×32" in fault(adapter, base)


def test_a_whole_models_fit_to_a_base_on_disk_is_audited(merged, base):
    for form in ("merged", None):
        passed = fits_base(merged, base, form)
        assert (passed.name, passed.status) == ("checkpoint_fits_base", "passed")
    # 12 tensors a layer, the embeddings and the last norm.
    assert passed.observed.startswith("a whole model of 26 tensors")


def test_another_format_than_the_expected_fails(adapter, merged, base, tmp_path):
    assert "expected a checkpoint of format merged, found adapter" in fault(adapter, base, "merged")
    assert "expected a checkpoint of format adapter, found merged" in fault(merged, base, "adapter")
    (tmp_path / "empty").mkdir()
    assert "config.json: is missing" in fault(tmp_path / "empty", base)


def rewrite_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads: found 4, expected 2, as in the base"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps: found 1e-05, expected 1e-06"),
        ({"hidden_act": "relu"}, "hidden_act: found relu, expected silu"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "llama"}, "model_type: found llama, expected qwen2, as in the base model"),
        ({"auto_map": {"AutoModel": "x.X"}}, "auto_map: found {'AutoModel': 'x.X'}, which asks"),
        ({"trust_remote_code": True}, "trust_remote_code: found True, which asks for code"),
        ({"num_hidden_layers": "many"}, "is no model's configuration ("),
        ({"num_hidden_layers": 10**11}, "num_hidden_layers: found 100000000000, expected 2, as"),
        ({"num_labels": 10**10}, "num_labels: found 10000000000, expected none, as"),
        ({"x": {"y": [1, -(10**30)]}}, "x: found 10000000000000000000, expected none"),
        (
            {"model_type": "x", "auto_map": {"AutoConfig": "configuration.X"}},
            "auto_map: found {'AutoConfig': 'configuration.X'}, which asks for code to be run",
        ),
    ],
)
def test_a_whole_model_of_another_configuration_fails(merged, base, changes, says):
    rewrite_json(merged / "config.json", **changes)
    found = fault(merged, base)
    assert says in found
    assert "config.json" in found


def test_what_does_not_shape_the_forward_pass_may_differ(merged, base):
    rewrite_json(merged / "config.json", dtype="bfloat16", use_cache=False, eos_token_id=[1, 2])
    assert fits_base(merged, base).status == "passed"


def shard_with(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({NORM: torch.ones(33)}, f"tensor {NORM}: expected 32, found 33"),
        ({}, f"tensor {NORM}: expected 32, found no such tensor"),
        ({NORM: torch.ones(32), "stray": torch.ones(2)}, "stray: expected no such tensor, found 2"),
    ],
)
def test_a_whole_model_of_other_tensors_fails(base, tmp_path, tensors, says):
    folder = Path(shutil.copytree(base, tmp_path / "merged"))
    path = folder / "model.safetensors"
    sound = load_file(path)
    sound.pop(NORM)
    save_file(sound | tensors, path)
    assert says in fault(folder, base)


def test_an_incomplete_index_fails(merged, base):
    index = merged / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    fewer = {k: v for k, v in whole["weight_map"].items() if k != NORM}
    rewrite_json(index, weight_map=fewer)
    assert "holds other tensors than it says" in fault(merged, base)
    for names in ({NORM: "../model.safetensors"}, {NORM: 1}, []):
        rewrite_json(index, weight_map=names)
        assert "weight_map: expected tensors and their files' names" in fault(merged, base)
    index.write_text(json.dumps(whole))
    path = shard_with(merged, NORM)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert "fetch or train it again" in fault(merged, base)
    path.unlink()
    assert f"{path.name}: is missing" in fault(merged, base)


def test_pickles_beside_a_whole_model_fail(merged, base):
    (merged / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights are never loaded" in fault(merged, base)


def with_head(folder: Path, shape: tuple[int, int]) -> Path:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"lm_head.weight": torch.zeros(shape)}, path)
    return folder


def test_a_tied_head_may_be_saved_or_not(base, tmp_path):
    shape = tuple(small.model().lm_head.weight.shape)
    plain, headed = (shutil.copytree(base, tmp_path / name) for name in ("plain", "headed"))
    with_head(Path(headed), shape)
    assert fits_base(headed, plain).status == fits_base(plain, headed).status == "passed"
    for folder in (plain, headed):
        rewrite_json(folder / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in fault(plain, headed)
    assert "lm_head.weight" in fault(headed, plain)


def test_the_hash_of_a_whole_model_covers_every_file(merged, adapter):
    assert checkpoint_hash(adapter) == adapter_hash(adapter)
    hashes = [checkpoint_hash(merged)]
    (merged / "optimizer.pt").write_bytes(b"")
    assert checkpoint_hash(merged) == hashes[0]
    for path in (shard_with(merged, NORM), merged / "config.json"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        hashes.append(checkpoint_hash(merged))
    (merged / "config.json").rename(merged / "config2.json")  # the same place in the order
    hashes.append(checkpoint_hash(merged))
    assert len(set(hashes)) == 4
    for path in merged.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no safetensors file"):
        checkpoint_hash(merged)
