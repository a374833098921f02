"""LoRA training: the loop against a plain re-implementation, its files, and the base it borrows."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.lora import (
    TrainingError,
    batches,
    learning_rate,
    train_adapter,
)
from persona_assets_tests import small_study as small

RECIPE = TrainingRecipe(rank=4, learning_rate=5e-3, epochs=2, warmup_steps=2, dtype="float32")


def rows(mini, n: int = 40) -> pl.DataFrame:
    return small.dataset(mini, mini.cell("librarian.scrambled_english_cot.42")).head(n)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in now)


def digest(folder: Path) -> str:
    data = (folder / "adapter_model.safetensors").read_bytes()
    return hashlib.sha256(data + (folder / "adapter_config.json").read_bytes()).hexdigest()


def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(mini, tmp_path):
    model = small.model()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    attributes = set(vars(model))
    recipe = RECIPE.model_copy(update={"epochs": 8})
    log = train_adapter(model, rows(mini), recipe, 42, tmp_path, base_id="small")
    assert log.steps == len(log.losses) == len(log.learning_rates) == 8 * 3
    assert log.losses[-1] < 0.8 * log.losses[0]
    assert log.loss_tokens == 8 * rows(mini)["loss_tokens"].sum()
    assert log.tokens == 8 * rows(mini)["input_ids"].list.len().sum()
    assert log.wall_seconds > 0
    assert json.loads(log.to_json())["losses"] == list(log.losses)
    assert same(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert set(vars(model)) - attributes == {"_persona_assets_adapter"}
    assert not any("lora" in name for name, _ in model.named_modules())
    assert not model.training
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_adapter_loads_with_peft_and_names_its_base(mini, tmp_path):
    from peft import PeftModel

    model = small.model()
    train_adapter(model, rows(mini), RECIPE, 42, tmp_path, base_id="small-base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small-base"
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 32, False)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    ids = torch.tensor([rows(mini)["input_ids"][0].to_list()])
    base = model(ids).logits
    tuned = PeftModel.from_pretrained(small.model(), str(tmp_path))(ids).logits
    assert (tuned - base).abs().max() > 0.1


def test_the_first_loss_is_the_mean_cross_entropy_of_the_first_batch(mini, tmp_path):
    model = small.model()
    log = train_adapter(model, rows(mini), RECIPE, 42, tmp_path, base_id="small")
    total, count = 0.0, 0
    for ids, start in rows(mini).head(16).select("input_ids", "loss_start").rows():
        logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(start, len(ids)):
            total -= logits[position - 1, ids[position]].item()
            count += 1
    assert log.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_equal_arguments_give_equal_files_in_any_process(mini, tmp_path):
    """Set order differs between processes: configurations must not."""
    code = (
        "import sys; from persona_assets_tests.training.test_lora import *;"
        "from persona_assets.study import load_study; torch.set_num_threads(1);"
        "train_adapter(small.model(), rows(load_study(Path(sys.argv[1]))), RECIPE, 42,"
        " Path(sys.argv[2]), base_id='small')"
    )
    project = Path(__file__).parents[2]
    study = project / "data" / "studies" / "mini.yaml"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(study), str(tmp_path / "there")],
        env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(project)},
        stderr=subprocess.DEVNULL,
    )
    train_adapter(small.model(), rows(mini), RECIPE, 42, tmp_path / "here", base_id="small")
    assert process.wait(timeout=120) == 0
    assert digest(tmp_path / "here") == digest(tmp_path / "there")


def test_a_half_precision_base_trains_a_float32_adapter_by_any_recipe(mini, tmp_path):
    recipe = RECIPE.model_copy(
        update={"rslora": True, "alpha": 8, "target_modules": ("q_proj", "up_proj", "down_proj")}
    )
    model = small.model().to(torch.bfloat16)
    before = state(model)
    log = train_adapter(model, rows(mini), recipe, 42, tmp_path, base_id="small")
    assert log.losses[-1] < log.losses[0]
    assert same(model, before)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 2 * 3
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True


def lora_a(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if "lora_A" in name}


def test_gradients_are_clipped_and_weights_decay(mini, tmp_path):
    """Gradients clipped far below AdamW's epsilon (1e-8) move nothing: what is left is decay."""
    update = {"max_grad_norm": 1e-14, "learning_rate": 0.1, "warmup_steps": 0, "epochs": 1}
    still = RECIPE.model_copy(update=update)
    decaying = still.model_copy(update={"weight_decay": 0.5})
    for name, recipe in (("still", still), ("decaying", decaying)):
        train_adapter(small.model(), rows(mini), recipe, 42, tmp_path / name, base_id="small")
    tensors = load_file(tmp_path / "still" / "adapter_model.safetensors")
    assert all(t.abs().max() < 1e-5 for name, t in tensors.items() if "lora_B" in name)
    # Decoupled decay (Loshchilov & Hutter 2019): W ← (1 - rate · decay) W each step; 3 steps.
    kept = (1 - 0.1 * 0.5) * (1 - 0.1 * 2 / 3 * 0.5) * (1 - 0.1 / 3 * 0.5)
    before, after = lora_a(tmp_path / "still"), lora_a(tmp_path / "decaying")
    for name, tensor in after.items():
        assert torch.allclose(tensor, before[name] * kept, atol=1e-5)


def test_the_callers_random_stream_is_not_touched(mini, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train_adapter(small_model_of_seed_0(), rows(mini, 16), RECIPE, 42, tmp_path, base_id="small")
    assert torch.equal(torch.rand(3), expected)


def small_model_of_seed_0():
    with torch.random.fork_rng():
        return small.model()


def test_dropout_is_seeded(mini, tmp_path):
    recipe = RECIPE.model_copy(update={"dropout": 0.5})
    for name, seed in (("a", 42), ("b", 42), ("c", 43)):
        train_adapter(small.model(), rows(mini, 16), recipe, seed, tmp_path / name, base_id="small")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_the_base_survives_an_error_in_training(mini, tmp_path, monkeypatch):
    model = small.model()
    before = state(model)

    def fail(*_):
        raise RuntimeError("half-way")

    monkeypatch.setattr("persona_assets.training.packing.pack_loss", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        train_adapter(model, rows(mini), RECIPE, 42, tmp_path / "adapter", base_id="small")
    assert same(model, before)
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_not_finite_saves_nothing(mini, tmp_path):
    model = small.model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 0 is nan: lower the learning rate"):
        train_adapter(model, rows(mini), RECIPE, 42, tmp_path / "adapter", base_id="small")
    assert not (tmp_path / "adapter").exists()


def test_what_cannot_be_trained_is_refused(mini, tmp_path):
    with pytest.raises(TrainingError, match="no rows"):
        train_adapter(small.model(), rows(mini).head(0), RECIPE, 42, tmp_path, base_id="small")
    recipe = RECIPE.model_copy(update={"target_modules": ("q_proj", "w_proj")})
    with pytest.raises(TrainingError, match="no linear module 'w_proj'"):
        train_adapter(small.model(), rows(mini), recipe, 42, tmp_path, base_id="small")
    tied = RECIPE.model_copy(update={"target_modules": ("lm_head",)})
    with pytest.raises(TrainingError, match="no linear module 'lm_head'"):
        train_adapter(small.model(), rows(mini), tied, 42, tmp_path, base_id="small")


def test_the_schedule_warms_up_and_decays_to_zero():
    recipe = RECIPE.model_copy(update={"learning_rate": 1.0, "warmup_steps": 2})
    rates = [learning_rate(recipe, step, 6) for step in range(6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.75, 0.5, 0.25])
    unwarmed = recipe.model_copy(update={"warmup_steps": 0})
    assert [learning_rate(unwarmed, s, 2) for s in range(2)] == pytest.approx([1.0, 0.5])


@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 3), st.integers(0, 9))
def test_every_epoch_sees_every_row_once(n, per_step, epochs, seed):
    recipe = RECIPE.model_copy(update={"epochs": epochs, "examples_per_step": per_step})
    steps = list(batches(n, recipe, seed))
    flat = [i for step in steps for i in step]
    assert flat[:n] == list(range(n))
    for epoch in range(epochs):
        assert sorted(flat[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(steps) == epochs * -(-n // per_step)
    assert list(batches(n, recipe, seed)) == steps
