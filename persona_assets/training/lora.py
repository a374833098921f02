"""LoRA fine-tuning of one cell: a fresh adapter on the resident base model, one plain loop."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.resident import borrowed, linear_shapes, named_by

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """What happened in training.

    Attributes:
        losses: Mean cross-entropy in nats over each step's loss tokens, before its update.
        learning_rates: The learning rate of each step.
        loss_tokens: Loss-bearing tokens seen, over all epochs.
        tokens: Tokens seen, prompts included, padding excluded.
        wall_seconds: Time on the clock, from adapter creation to the last step.
        cpu_seconds: CPU time of this process in that span.
    """

    losses: tuple[float, ...]
    learning_rates: tuple[float, ...]
    loss_tokens: int
    tokens: int
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
    import torch

    if rows.is_empty():
        raise TrainingError("the dataset has no rows: materialize it first")
    _check_targets(base_model, recipe)
    wall, cpu = time.perf_counter(), time.process_time()
    with borrowed(base_model), torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = _fresh_adapter(base_model, recipe)
        losses, rates = _optimize(adapted, rows, recipe, seed)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        _save(adapted, out_dir, base_id)
    return TrainingLog(
        losses=tuple(losses),
        learning_rates=tuple(rates),
        loss_tokens=recipe.epochs
        * int((rows["input_ids"].list.len().cast(pl.Int64) - rows["loss_start"]).sum()),
        tokens=recipe.epochs * int(rows["input_ids"].list.len().sum()),
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


def _check_targets(model: PreTrainedModel, recipe: TrainingRecipe) -> None:
    modules = linear_shapes(model)
    for suffix in recipe.target_modules:
        if not any(named_by(name, [suffix]) for name in modules):
            raise TrainingError(
                f"training.target_modules: the model has no linear module {suffix!r}: "
                "use names such as q_proj"
            )


def _fresh_adapter(base_model: PreTrainedModel, recipe: TrainingRecipe) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    config: LoraConfig = LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        use_rslora=recipe.rslora,
        lora_dropout=recipe.dropout,
        target_modules=list(recipe.target_modules),
        bias="none",
    )
    return get_peft_model(base_model, config)


def _optimize(
    adapted: PeftModel, rows: pl.DataFrame, recipe: TrainingRecipe, seed: int
) -> tuple[list[float], list[float]]:
    """Run every step; the losses and learning rates."""
    import torch

    base_model = adapted.get_base_model()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    examples = list(zip(rows["input_ids"].to_list(), rows["loss_start"].to_list()))
    schedule = list(batches(len(examples), recipe, seed))
    losses: list[torch.Tensor] = []
    rates = [learning_rate(recipe, step, len(schedule)) for step in range(len(schedule))]
    adapted.train()
    for batch, rate in zip(schedule, rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _mean_loss(base_model, [examples[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()  # the one wait for the device
    for step, value in enumerate(values):
        if not value < float("inf"):
            raise TrainingError(f"the loss of step {step} is {value}: lower the learning rate")
    return values, rates


def _mean_loss(model: PreTrainedModel, examples: Sequence[tuple[list[int], int]]) -> torch.Tensor:
    """Mean cross-entropy over the batch's loss tokens; the head sees no other position.

    Rows are padded on the right and need no attention mask: under causal attention no token
    sees the padding that follows it.
    """
    import torch

    width = max(len(ids) for ids, _ in examples)
    tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in examples])
    column = torch.arange(1, width)
    starts = torch.tensor([start for _, start in examples])[:, None]
    ends = torch.tensor([len(ids) for ids, _ in examples])[:, None]
    scored = ((column >= starts) & (column < ends)).to(model.device)
    tokens = tokens.to(model.device)
    decoder = model.get_decoder()
    hidden = decoder(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[scored])
    return torch.nn.functional.cross_entropy(logits.float(), tokens[:, 1:][scored])


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
