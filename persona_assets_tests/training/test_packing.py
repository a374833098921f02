"""Packed training against plain transformers and PEFT loops on padded batches, none of it ours."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path

import polars as pl
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.nn import functional

from persona_assets.study_schema import TrainingRecipe
from persona_assets.training import checkpoints, lora, packing
from persona_assets.training.lora import TrainingError, add_gradients, attached, train_adapter
from persona_assets.training.packing import pack, pack_loss, packed_attention
from persona_assets_tests import small_study as small
from persona_assets_tests.training.test_lora import digest, lora_a, rows, same, state

RECIPE = TrainingRecipe(rank=4, learning_rate=5e-3, warmup_steps=2, dtype="float32")


class RMSNorm(torch.nn.RMSNorm):
    """Qwen2's, which rounds to float32 on the way."""

    def __init__(self, theirs) -> None:
        super().__init__(len(theirs.weight), theirs.variance_epsilon, dtype=torch.float64)
        self.weight = theirs.weight


def in_float64():
    model = small.model().double()
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            model.set_submodule(name, RMSNorm(module))
    return model


def ragged(mini, n: int = 40) -> pl.DataFrame:
    """Rows cut short, so that no two neighbours have the same length."""
    cut = rows(mini, n).select("input_ids", "loss_start").rows()
    return pl.DataFrame(
        {
            "input_ids": [ids[: len(ids) - 3 * (row % 7)] for row, (ids, _) in enumerate(cut)],
            "loss_start": [start - 2 * (row % 3) for row, (_, start) in enumerate(cut)],
        }
    )


def examples(mini, n: int = 12) -> list[tuple[list[int], int]]:
    return ragged(mini, n).rows()


def plain(model, recipe: TrainingRecipe = RECIPE) -> PeftModel:
    """As PEFT's documentation has it."""
    config: LoraConfig = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        target_modules=list(recipe.target_modules),
    )
    return get_peft_model(model, config).train()


def started(adapted: PeftModel, seed: int) -> PeftModel:
    """With PEFT's own start, drawn from ``seed`` in float32 layer by layer."""
    torch.manual_seed(seed)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A.float()
            layer.reset_lora_parameters("default", True)
            layer.lora_A.to(adapted.dtype)
    return adapted


def padded_loss(model: PeftModel, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Padded on the right, masked, labels of -100; transformers' own loss but for float64."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    labels = torch.tensor([[-100] * s + ids[s:] + [-100] * (width - len(ids)) for ids, s in batch])
    output = model(input_ids=ids, attention_mask=mask, labels=labels)
    if output.logits.dtype != torch.float64:
        return output.loss
    return functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def draw(adapted: PeftModel) -> dict[str, torch.nn.Parameter]:
    """LoRA's parameters, both factors drawn: A has no gradient while B is zero."""
    generator = torch.Generator().manual_seed(1)
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in parameters.values():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn / 10)
    return parameters


def gradients(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.double() for name, parameter in parameters.items()}


def of_padded(model, batch, **autocast) -> tuple[float, dict[str, torch.Tensor]]:
    adapted = plain(model)
    parameters = draw(adapted)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        loss = padded_loss(adapted, batch)
    loss.backward()
    return loss.item(), gradients(parameters)


def of_packed(model, batch, per_pack: int = 99) -> tuple[float, dict[str, torch.Tensor]]:
    parts = [batch[first : first + per_pack] for first in range(0, len(batch), per_pack)]
    with attached(model, RECIPE, 0) as adapted:
        parameters = draw(adapted)
        loss = add_gradients(model, [pack(part, model.device) for part in parts])
        return loss.item(), gradients(parameters)


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a parameter's gradient, in the 2-norm."""
    assert found.keys() == expected.keys()
    assert min(gradient.norm() for gradient in expected.values()) > 0
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    )


@pytest.mark.parametrize("per_pack", [99, 5, 1])
def test_a_packed_step_has_the_padded_steps_gradients(mini, per_pack):
    batch = examples(mini)
    assert len({len(ids) for ids, _ in batch}) > 6
    loss, expected = of_padded(in_float64(), batch)
    packed_loss, found = of_packed(in_float64(), batch, per_pack)
    assert packed_loss == pytest.approx(loss, rel=1e-12)
    assert worst(found, expected) < 1e-9


def test_in_float32_they_differ_by_the_order_of_sums(mini):
    """A gradient sums over some 1000 tokens: a hundred times the unit roundoff of 6e-8 is ample."""
    batch = examples(mini)
    loss, expected = of_padded(small.model(), batch)
    packed_loss, found = of_packed(small.model(), batch)
    assert packed_loss == pytest.approx(loss, rel=1e-6)
    assert worst(found, expected) < 6e-6


def test_in_bfloat16_packing_is_as_exact_as_padding(mini):
    """The dtype itself costs per cent (its unit roundoff is 0.4 %): packing may not cost more.

    Both are held against float64; between two roundings of one computation, a factor of 1.5.
    """
    batch, half = examples(mini), small.model().to(torch.bfloat16)
    exact = in_float64().to(torch.bfloat16).double()
    loss, expected = of_padded(exact, batch)
    padded = worst(of_padded(small.model().to(torch.bfloat16), batch)[1], expected)
    packed_loss, found = of_packed(half, batch)
    assert 1e-3 < padded < 0.1
    assert worst(found, expected) < 1.5 * padded
    assert packed_loss == pytest.approx(loss, rel=4e-3)


def dense_attention(q, k, v, starts, _, longest, __, *, scale, **options) -> torch.Tensor:
    """As torch's kernel for variable lengths, by one dense mask over the whole pack."""
    example = torch.bucketize(torch.arange(len(q)), starts[1:], right=True)
    mask = (example[:, None] == example) & torch.ones(len(q), len(q)).tril().bool()
    heads = (tensor.transpose(0, 1) for tensor in (q, k, v))
    out = functional.scaled_dot_product_attention(
        *heads, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return out.transpose(0, 1)


def checked_attention(q, k, v, starts_q, starts_k, longest_q, longest_k, **options):
    """As above, holding its arguments to what torch's kernel asks for."""
    assert starts_q is starts_k
    assert starts_q.dtype == torch.int32
    assert longest_q == longest_k == starts_q.diff().max()
    assert options["window_size"] == (-1, 0)
    return dense_attention(q, k, v, starts_q, starts_k, longest_q, longest_k, **options)


def test_both_kernels_are_called_to_the_same_effect(mini, monkeypatch):
    batch = examples(mini)
    loss, expected = of_packed(in_float64(), batch)
    monkeypatch.setattr(packing, "_has_kernel", lambda of: isinstance(of, torch.Tensor))
    monkeypatch.setattr(packing, "varlen_attn", checked_attention)
    other_loss, found = of_packed(in_float64(), batch)
    assert other_loss == pytest.approx(loss, rel=1e-12)
    assert worst(found, expected) < 1e-9


@pytest.fixture
def compiling(monkeypatch) -> Iterator[dict[str, int]]:
    """As on a GPU: layers are compiled, but without code generation. Yields dynamo's counts."""
    monkeypatch.setattr(packing, "_has_kernel", lambda of: True)
    monkeypatch.setattr(packing, "varlen_attn", dense_attention)
    compile_layer = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch.compiler.reset()


def test_compiled_layers_make_the_same_step_and_share_their_graph(mini, compiling):
    batches = examples(mini, 36)
    model = small.model(num_hidden_layers=4).double()
    with torch.compiler.set_stance("force_eager"):
        expected = [of_packed(model, batches[first : first + 12]) for first in (0, 12, 24)]
    assert compiling["unique_graphs"] == 0
    for first, (loss, gradient) in zip((0, 12, 24), expected, strict=True):
        found_loss, found = of_packed(model, batches[first : first + 12])
        assert found_loss == pytest.approx(loss, rel=1e-12)
        assert worst(found, gradient) < 1e-9
    assert compiling["unique_graphs"] == 1
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert not model.get_input_embeddings()._forward_hooks
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_no_example_sees_another(mini):
    model, batch = in_float64(), examples(mini, 6)

    def loss_of_second(*pack_of) -> float:
        whole = pack([pack_of[0], pack_of[1], pack_of[2]], model.device)
        first, second = (len(ids) - start for ids, start in pack_of[:2])
        own = slice(first, first + second)
        alone = replace(whole, scored=whole.scored[own], targets=whole.targets[own])
        return pack_loss(model, alone).item()

    before, other, after, another = batch[0], batch[1], batch[2], batch[3]
    changed = ([*other[0][:3], other[0][3] + 1, *other[0][4:]], other[1])
    with packed_attention(model):
        loss = loss_of_second(before, other, after)
        assert loss_of_second(another, other, before) == pytest.approx(loss, rel=1e-12)
        assert abs(loss_of_second(before, changed, after) - loss) > 1e-6
    assert model.config._attn_implementation == "sdpa"


def test_a_pack_is_laid_out_by_hand():
    packed = pack([([5, 6, 7], 1), ([8, 9, 4, 3], 3)], torch.device("cpu"))
    assert packed.ids.tolist() == [[5, 6, 8, 9, 4]]
    assert packed.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert packed.bounds.tolist() == [0, 2, 5]
    assert packed.bounds.dtype == torch.int32
    assert packed.longest == 3
    assert packed.scored.tolist() == [0, 1, 4]
    assert packed.targets.tolist() == [6, 7, 3]


def test_attention_that_packs_do_not_know_is_refused(mini):
    model = small.model(attention_dropout=0.1)
    with pytest.raises(ValueError, match="neither attention dropout nor sliding windows"):
        of_packed(model, examples(mini, 2))


def plain_loop(model, frame: pl.DataFrame, recipe: TrainingRecipe, seed: int):
    """A PEFT loop as one would write it for one epoch; the losses and the model."""
    adapted = started(plain(model, recipe), seed)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=recipe.weight_decay)
    batches = [
        frame.slice(first, 16).select("input_ids", "loss_start").rows()
        for first in range(0, len(frame), 16)
    ]
    losses = []
    for step, batch in enumerate(batches):
        warm = (step + 1) / recipe.warmup_steps
        decay = (len(batches) - step) / (len(batches) - recipe.warmup_steps)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min(1, warm, decay)
        loss = padded_loss(adapted, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, adapted.eval()


def test_an_epoch_follows_the_plain_loop_and_its_file_has_the_same_logits(mini, tmp_path):
    frame = pl.concat([ragged(mini), ragged(mini), ragged(mini, 36)])
    losses, adapted = plain_loop(in_float64(), frame, RECIPE, 42)
    log = train_adapter(in_float64(), frame, RECIPE, 42, tmp_path, base_id="small")
    assert log.losses == pytest.approx(losses, rel=1e-9)
    assert losses[-1] < 0.95 * losses[0]
    ids = torch.tensor([frame["input_ids"][0].to_list()])
    loaded = PeftModel.from_pretrained(in_float64(), str(tmp_path), autocast_adapter_dtype=False)
    expected = adapted(ids).logits
    assert (loaded.eval()(ids).logits - expected).abs().max() < 1e-7 * expected.abs().max()


def start(model, seed: int, recipe: TrainingRecipe = RECIPE) -> dict[str, torch.Tensor]:
    """The parameters of a fresh adapter, in the order of the model's modules."""
    with attached(model, recipe, seed) as adapted:
        parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert all(p.grad is None for p in parameters.values())
        return {name: p.detach().clone() for name, p in parameters.items()}


def test_an_adapter_starts_as_pefts_does(mini):
    model = small.model()
    reference = started(plain(small.model()), 42)
    expected = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    for found in (start(model, 42), start(model, 42)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(*(start(model, seed)[next(iter(found))] for seed in (42, 43)))


def test_layers_are_kept_between_cells_of_one_recipe(mini):
    model = small.model()

    def layer(recipe: TrainingRecipe):
        with attached(model, recipe, 42):
            return model.model.layers[0].self_attn.q_proj

    query = model.model.layers[0].self_attn.q_proj
    first = layer(RECIPE)
    assert first.base_layer is query
    assert layer(RECIPE.model_copy(update={"learning_rate": 1, "epochs": 5})) is first
    assert model.model.layers[0].self_attn.q_proj is query
    for other in ({"rank": 5}, {"alpha": 1}, {"rslora": True}, {"dropout": 0.1}):
        assert layer(RECIPE.model_copy(update=other)) is not first
    assert layer(RECIPE.model_copy(update={"target_modules": ("v_proj",)})) is query
    model.double()
    assert layer(RECIPE).lora_A["default"].weight.dtype == torch.float64


def test_a_base_that_was_trained_on_can_be_freed(mini):
    model = small.model()
    start(model, 42)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_cells_adapter_does_not_depend_on_the_cells_before_it(mini, tmp_path, monkeypatch):
    """Be they of another recipe, evaluated, or cut off half-way through a step."""
    model, asked = small.model(), torch.arange(9)[None]
    before, answer = state(model), model(asked).logits

    def trained(name: str, seed: int = 42, **changes) -> str:
        recipe = RECIPE.model_copy(update=changes)
        train_adapter(model, rows(mini), recipe, seed, tmp_path / name, base_id="small")
        assert same(model, before)
        return digest(tmp_path / name)

    def fail(*_, **__):
        raise RuntimeError("half-way")

    first = trained("first")
    assert torch.equal(model(asked).logits, answer)
    assert trained("other seed", 137) != first
    with checkpoints.beside(model, tmp_path / "other seed"):
        assert not torch.equal(model(asked).logits, answer)
    assert trained("evaluated in between") == first
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
        with pytest.raises(RuntimeError, match="half-way"):
            trained("cut off")
    assert same(model, before)
    assert trained("after an error") == first
    trained("other recipe", rank=3, dropout=0.5)
    assert trained("after another recipe") == first


def first_gradient(model, batch, **changes) -> torch.Tensor:
    """Of lora_B of the first layer's query, while B is zero."""
    with attached(model, RECIPE.model_copy(update=changes), 0) as adapted:
        add_gradients(model, [pack(batch, model.device)])
        layer = adapted.get_base_model().model.layers[0].self_attn.q_proj
        return layer.lora_B["default"].weight.grad.clone()


def test_each_option_of_a_recipe_changes_what_it_should(mini, tmp_path):
    batch, model = examples(mini, 4), small.model()
    usual = first_gradient(model, batch)
    assert usual.shape == (32, 4)
    assert torch.allclose(first_gradient(model, batch, alpha=64), 2 * usual, rtol=1e-5)
    assert torch.allclose(first_gradient(model, batch, rslora=True), math.sqrt(4) * usual)
    assert first_gradient(model, batch, rank=6).shape == (32, 6)

    def trained(name: str, frame: pl.DataFrame, **changes):
        recipe = RECIPE.model_copy(update=changes)
        return train_adapter(model, frame, recipe, 42, tmp_path / name, base_id="small")

    frame = rows(mini)
    as_usual = trained("usual", frame)
    dropped, longer = trained("dropped", frame, dropout=0.5), trained("longer", frame, epochs=3)
    later = trained("later", frame.with_columns(loss_start=pl.col("loss_start") + 3))
    trained("mlp", frame, target_modules=("down_proj",))
    assert dropped.losses[0] == as_usual.losses[0]  # B = 0: nothing to drop yet
    assert dropped.losses[1:] != as_usual.losses[1:]
    assert (longer.steps, as_usual.steps) == (9, 3)
    assert later.loss_tokens == as_usual.loss_tokens - 3 * len(frame)
    assert later.losses[0] != as_usual.losses[0]
    assert {name.split(".")[-3] for name in lora_a(tmp_path / "mlp")} == {"down_proj"}
    assert {name.split(".")[-3] for name in lora_a(tmp_path / "usual")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }


@contextmanager
def room_for(count: int, monkeypatch) -> Iterator[list[int]]:
    """A device whose memory holds ``count`` examples a pack, but only in the backward pass.

    A first pack of a step may fit (and leave gradients behind) where the second one does not:
    the first 8 of every step do. Yields the examples of each pack tried.
    """
    tried: list[int] = []

    def limited(model, pack):
        examples = len(pack.bounds) - 1
        tried.append(examples)
        fresh = examples == 8 and tried[-2:] != [8, 8]
        if examples > count and not fresh:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return pack_loss(model, pack)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_loss", limited)
        yield tried


def test_when_memory_runs_out_smaller_packs_make_the_same_step(mini, tmp_path, caplog, monkeypatch):
    whole = train_adapter(in_float64(), rows(mini), RECIPE, 42, tmp_path / "whole", base_id="b")
    model = in_float64()
    with room_for(4, monkeypatch) as tried, caplog.at_level(logging.WARNING):
        log = train_adapter(model, rows(mini), RECIPE, 42, tmp_path / "packs", base_id="b")
        assert tried == [16, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
        assert [record.message.split(";")[0] for record in caplog.records] == [
            "step 0: out of memory with 16 examples a pack",
            "step 0: out of memory with 8 examples a pack",
        ]
        caplog.clear()
        train_adapter(model, rows(mini), RECIPE, 137, tmp_path / "next", base_id="b")
        assert not caplog.records
        assert max(tried[13:]) == 4
    assert (whole.examples_per_pack, log.examples_per_pack) == (16, 4)
    assert log.losses == pytest.approx(whole.losses, rel=1e-9)
    expected = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    found = load_file(tmp_path / "packs" / "adapter_model.safetensors")
    assert worst(found, expected) < 1e-9


def test_a_device_too_small_for_one_example_is_named(mini, tmp_path, monkeypatch):
    model = small.model()
    before = state(model)
    with (
        room_for(0, monkeypatch),
        pytest.raises(TrainingError, match="step 0: the device's memory does not hold one example"),
    ):
        train_adapter(model, rows(mini), RECIPE, 42, tmp_path / "adapter", base_id="small")
    assert not Path(tmp_path / "adapter").exists()
    assert same(model, before)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("start", [0, 3])
def test_a_row_without_a_loss_token_is_refused(tmp_path, start):
    frame = pl.DataFrame({"input_ids": [[1, 2, 3], [4, 5, 6]], "loss_start": [1, start]})
    with pytest.raises(TrainingError, match=rf"row 1: loss_start is {start} .* has 3 tokens"):
        lora.train_adapter(small.model(), frame, RECIPE, 42, tmp_path, base_id="small")
