"""LoRA fine-tuning of one cell: a fresh adapter on the resident base, one loop for any device."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import polars as pl

from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.resident import borrowed, linear_shapes, named_by

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import PreTrainedModel

    from persona_assets.training.packing import Pack

log = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: The attribute of a base model under which its LoRA layers are kept between cells.
_KEPT = "_persona_assets_adapter"

Example = tuple[list[int], int]
#: Examples a pack, for the base models on which the memory held no larger packs.
_room: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """What happened in training.

    Attributes:
        losses: Mean cross-entropy in nats over each step's loss tokens, before its update.
        learning_rates: The learning rate of each step.
        loss_tokens: Loss-bearing tokens seen, over all epochs.
        tokens: Tokens seen, prompts included.
        examples_per_pack: Examples that the last step took forward and back together.
        wall_seconds: Time on the clock, from adapter creation to the last step.
        cpu_seconds: CPU time of this process in that span.
    """

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    loss_tokens: int
    tokens: int
    examples_per_pack: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.losses)

    def to_json(self) -> str:
        """The log as indented JSON."""
        return json.dumps({"steps": self.steps} | asdict(self), indent=1)


class TrainingError(ValueError):
    """Rows or a recipe that cannot be trained with, or a loss that is not finite."""


def train_adapter(
    base_model: PreTrainedModel,
    rows: pl.DataFrame,
    recipe: TrainingRecipe,
    seed: int,
    out_dir: Path,
    *,
    base_id: str,
) -> TrainingLog:
    """Train a LoRA adapter on ``rows`` and save it to ``out_dir`` in PEFT's format.

    The base model is borrowed: it is bit-identical afterwards, also if training raises. Equal
    arguments on the same CPU with the same thread count give byte-identical files; on a GPU,
    whose kernels may sum in any order, they agree up to rounding.

    Args:
        base_model: A causal language model, on the device and in the dtype to train in.
        rows: A training dataset (its columns ``input_ids`` and ``loss_start`` are read), in
            the order of the first epoch; later epochs are shuffled from ``seed``.
        recipe: Rank, schedule and the rest.
        seed: Seeds LoRA initialisation, dropout and the order of later epochs.
        out_dir: Made if missing; the configuration is written last.
        base_id: What the adapter says it belongs to: a hub id or a content hash, never a path.

    Raises:
        TrainingError: no rows, a target module that the model has not, or a loss that is not
            finite; nothing is saved.
    """
    examples = _examples(rows)
    _check_targets(base_model, recipe)
    wall, cpu = time.perf_counter(), time.process_time()
    with attached(base_model, recipe, seed) as adapted:
        losses, rates, per_pack = _optimize(adapted, examples, recipe, seed)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        _save(adapted, out_dir, base_id)
    return TrainingLog(
        losses=tuple(losses),
        learning_rates=tuple(rates),
        loss_tokens=recipe.epochs * sum(len(ids) - start for ids, start in examples),
        tokens=recipe.epochs * sum(len(ids) for ids, _ in examples),
        examples_per_pack=per_pack,
        wall_seconds=wall,
        cpu_seconds=cpu,
    )


def learning_rate(recipe: TrainingRecipe, step: int, steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then linear decay that reaches 0 after the last step.

    ``step`` counts from 0.
    """
    warm = (step + 1) / max(1, recipe.warmup_steps)
    decay = (steps - step) / max(1, steps - recipe.warmup_steps)
    return recipe.learning_rate * min(1.0, warm, decay)


def batches(n: int, recipe: TrainingRecipe, seed: int) -> Iterator[list[int]]:
    """Row numbers of each optimizer step: the rows' own order first, then one shuffle an epoch."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        order = list(range(n)) if epoch == 0 else torch.randperm(n, generator=generator).tolist()
        for start in range(0, n, recipe.examples_per_step):
            yield order[start : start + recipe.examples_per_step]


def _examples(rows: pl.DataFrame) -> list[Example]:
    """(ids, loss_start) of each row."""
    if rows.is_empty():
        raise TrainingError("the dataset has no rows: materialize it first")
    examples = list(zip(rows["input_ids"].to_list(), rows["loss_start"].to_list()))
    for number, (ids, start) in enumerate(examples):
        if not 0 < start < len(ids):
            raise TrainingError(
                f"row {number}: loss_start is {start} and input_ids has {len(ids)} tokens: "
                "some token after the first must bear loss"
            )
    return examples


def _check_targets(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    modules = linear_shapes(model)
    for suffix in recipe.target_modules:
        if not any(named_by(name, [suffix]) for name in modules):
            raise TrainingError(
                f"training.target_modules: the model has no linear module {suffix!r}: "
                "use names such as q_proj"
            )


@contextmanager
def attached(base_model: PreTrainedModel, recipe: TrainingRecipe, seed: int) -> Iterator[PeftModel]:
    """A fresh adapter on the borrowed base, ready for :func:`add_gradients`.

    LoRA's A is drawn from ``seed`` on the CPU, so that a cell starts from the same adapter on
    every device; B is zero. The layers are those of the cell before, if it had the same recipe:
    what it left in them does not show.
    """
    import torch

    from persona_assets.training.packing import compiled_layers, packed_attention

    device = base_model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        adapter = _adapter(base_model, recipe)
        with borrowed(base_model), packed_attention(base_model), compiled_layers(base_model):
            base_model.requires_grad_(False)
            torch.manual_seed(seed)
            for name, layer in adapter.layers.items():
                _reset(layer)
                base_model.set_submodule(name, layer)
            yield adapter.adapted.train()


@dataclass(frozen=True, slots=True)
class _Adapter:
    """LoRA layers made for a base model, but not in place.

    Attributes:
        made_for: PEFT's settings, the base's device and its dtype.
        adapted: PEFT's view of the base, an adapter's once the layers are in place.
        layers: By the full name of the module that each one wraps.
    """

    made_for: tuple
    adapted: PeftModel
    layers: Mapping[str, LoraLayer]


def _adapter(base_model: PreTrainedModel, recipe: TrainingRecipe) -> _Adapter:
    """The layers that the recipe asks for: those that the base has kept, else new ones.

    Making them takes PEFT a good part of a second at billions of parameters. They are kept as an
    attribute of the base (its own modules they are not), and go when it goes.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    config: LoraConfig = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        bias="none",
    )
    made_for = (config.to_dict(), base_model.device, base_model.dtype)
    kept: _Adapter | None = vars(base_model).pop(_KEPT, None)
    if kept is None or kept.made_for != made_for:
        kept = None  # its memory first
        with borrowed(base_model):
            adapted = get_peft_model(base_model, config)
            modules = base_model.named_modules()
            layers = {name: layer for name, layer in modules if isinstance(layer, LoraLayer)}
        for layer in layers.values():
            # Under autocast PEFT would make a float32 copy of every input, to be cast back.
            layer.cast_input_dtype_enabled = not _is_half(base_model)
        kept = _Adapter(made_for, adapted, layers)
    setattr(base_model, _KEPT, kept)
    return kept


def _reset(layer: LoraLayer) -> None:
    """PEFT's default start: A uniform (He et al. 2015, a = √5), B zero; no gradient."""
    import torch

    (a,), (b,) = layer.lora_A.parameters(), layer.lora_B.parameters()
    drawn = torch.empty(a.shape, dtype=torch.float32)
    torch.nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    with torch.no_grad():
        a.copy_(drawn)
        b.zero_()
    a.grad = b.grad = None


def _optimize(
    adapted: PeftModel, examples: Sequence[Example], recipe: TrainingRecipe, seed: int
) -> tuple[list[float], list[float], int]:
    """Run every step; the losses, the learning rates and how many examples a pack had room for.

    Everything is on the device before the first step, and no step waits for the device.
    """
    import torch

    base_model = adapted.get_base_model()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    schedule = list(batches(len(examples), recipe, seed))
    rates = [learning_rate(recipe, step, len(schedule)) for step in range(len(schedule))]
    losses: list[torch.Tensor] = []
    packs = _Packs(base_model, examples, schedule, recipe.examples_per_step)
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        while (loss := add_gradients(base_model, packs.of_step(step))) is None:
            optimizer.zero_grad(set_to_none=True)
            packs.halve(step)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
    values = torch.stack(losses).tolist()  # the one wait for the device
    for step, value in enumerate(values):
        if not value < float("inf"):
            raise TrainingError(f"the loss of step {step} is {value}: lower the learning rate")
    return values, rates, packs.examples_per_pack


class _Packs:
    """The packs of every step, laid out beforehand; smaller ones once the device's memory is full.

    Packs that turn out too large for a base model stay smaller for all its later cells.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        schedule: Sequence[list[int]],
        per_step: int,
    ) -> None:
        self.model, self.examples, self.schedule = model, examples, schedule
        self.examples_per_pack = min(per_step, _room.get(model, per_step))
        self._lay_out(0)

    def of_step(self, step: int) -> list[Pack]:
        """The packs whose gradients add up to the step's."""
        return self._packs[step]

    def halve(self, step: int) -> None:
        """From ``step`` on, half as many examples a pack.

        Raises:
            TrainingError: a pack already holds one example only.
        """
        before = min(self.examples_per_pack, len(self.schedule[step]))
        if before == 1:
            raise TrainingError(
                f"step {step}: the device's memory does not hold one example: shorten the "
                "longest rows, lower training.rank, or use a device with more memory"
            )
        self.examples_per_pack = _room[self.model] = (before + 1) // 2
        log.warning(
            "step %d: out of memory with %d examples a pack; going on with %d (the same step, "
            "its gradients added up)",
            step,
            before,
            self.examples_per_pack,
        )
        self._lay_out(step)

    def _lay_out(self, first: int) -> None:
        from persona_assets.training.packing import pack

        size = self.examples_per_pack
        kept = self._packs[:first] if first else []
        self._packs = kept + [
            [
                pack([self.examples[row] for row in batch[start : start + size]], self.model.device)
                for start in range(0, len(batch), size)
            ]
            for batch in self.schedule[first:]
        ]


def _is_half(model: PreTrainedModel) -> bool:
    """Whether to compute in bfloat16; the adapter's parameters stay float32 all the same."""
    import torch

    return model.dtype == torch.bfloat16


def add_gradients(model: PreTrainedModel, packs: Sequence[Pack]) -> torch.Tensor | None:
    """Add the gradients of the step's mean loss; that loss, or None if memory ran out half-way."""
    import torch

    from persona_assets.training.packing import pack_loss

    loss_tokens = sum(len(pack.targets) for pack in packs)
    mean = torch.zeros((), device=model.device, dtype=torch.float64)
    try:
        for pack in packs:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=_is_half(model)):
                loss = pack_loss(model, pack) / loss_tokens
            loss.backward()
            mean += loss.detach()
    except torch.OutOfMemoryError:
        return None
    return mean


def _save(adapted: PeftModel, out_dir: Path, base_id: str) -> None:
    """Weights, then configuration: the latter marks the adapter as complete.

    Not through ``save_pretrained``: it writes ``target_modules`` in the order of a set of
    strings, which differs from process to process, and a model card.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    from persona_assets.store import write_atomically

    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    config = adapted.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_id, "inference_mode": True}
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / f".{ADAPTER_WEIGHTS}.part"
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())},
        temporary,
        metadata={"format": "pt"},
    )
    temporary.replace(out_dir / ADAPTER_WEIGHTS)
    write_atomically(out_dir / ADAPTER_CONFIG, json.dumps(plain, indent=1, sort_keys=True) + "\n")
