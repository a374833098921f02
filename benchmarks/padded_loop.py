"""A training loop as users of transformers and PEFT write it, to hold the project's against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks.cell_workload import Example
from persona_assets.study_schema import TrainingRecipe
from persona_assets.training.resident import borrowed


@contextmanager
def plain_peft(model: PreTrainedModel, recipe: TrainingRecipe) -> Iterator[PeftModel]:
    """The model as a user of PEFT would wrap it."""
    with borrowed(model):
        config: LoraConfig = LoraConfig(
            r=recipe.rank,
            lora_alpha=recipe.alpha,
            use_rslora=recipe.rslora,
            target_modules=list(recipe.target_modules),
        )
        yield get_peft_model(model, config).train()


def padded_gradients(adapted: PeftModel, examples: list[Example], micro: int) -> torch.Tensor:
    """Add the gradients of a step's mean loss as such loops do: padding, mask, labels of -100."""
    device = adapted.device
    loss_tokens = sum(len(ids) - start for ids, start in examples)
    total = torch.zeros((), device=device)
    for first in range(0, len(examples), micro):
        part = examples[first : first + micro]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part])
        labels = torch.tensor(
            [[-100] * s + row[s:] + [-100] * (width - len(row)) for row, s in part]
        )
        half = next(adapted.parameters()).dtype == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = adapted(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                labels=labels.to(device),
                num_items_in_batch=loss_tokens,
                use_cache=False,
            ).loss
        loss.backward()
        total += loss.detach()
    return total


def run_steps(
    adapted: PeftModel,
    recipe: TrainingRecipe,
    steps: list[list[Example]],
    micro: int,
    sync: Callable[[], None],
) -> tuple[float, float, float]:
    """Seconds for the steps after one to warm up, seconds for the same steps again, first loss.

    Each width of a batch is a shape of its own, whose kernels are chosen and loaded when it is
    first met: a script that trains one cell pays for that, one that trains many hardly does.
    """
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)

    def run(step: list[Example]) -> torch.Tensor:
        loss = padded_gradients(adapted, step, micro)
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def timed() -> tuple[float, float]:
        sync()
        start = time.perf_counter()
        losses = [run(step) for step in steps]
        sync()
        return time.perf_counter() - start, float(losses[0])

    run(max(steps, key=lambda step: max(len(ids) for ids, _ in step)))
    first, loss = timed()
    return first, timed()[0], loss
