"""Borrowing the resident base model: whatever is done to it meanwhile, it comes back as it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def borrowed(model: PreTrainedModel, *, changing: Collection[str] = ()) -> Iterator[None]:
    """Undo, on the way out, what PEFT does to a model in place, even if it raises half-way.

    Modules that adapters replaced are put back, gradient flags and training modes restored, and
    the weights named in ``changing`` (modules whose ``weight`` is merged into) are copied back
    bit for bit. One base model serves every cell this way, without reloading.
    """
    children = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
    ]
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [
        (module.weight, module.weight.detach().clone())
        for module in (model.get_submodule(name) for name in changing)
    ]
    attributes = set(vars(model))
    try:
        yield
    finally:
        for parent, name, child in children:
            if getattr(parent, name) is not child:
                setattr(parent, name, child)
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for weight, original in weights:
            weight.data.copy_(original)
        for name in set(vars(model)) - attributes:
            delattr(model, name)


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(out, in) features of every linear module with weights of its own, by full name.

    An output head that is tied to the input embeddings is left out: to adapt it would change both.
    """
    from torch import nn

    embedding = model.get_input_embeddings().weight
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is not embedding
    }


def named_by(name: str, suffixes: Collection[str]) -> bool:
    """Whether LoRA's ``target_modules`` name this module: in full, or by its last parts."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
