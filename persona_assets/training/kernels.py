"""Fused kernels for the layers of a borrowed model: two ways, of which measurement keeps one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """torch.compile, layer by layer: all layers and all later cells share one compiled graph."""
    layers = model.get_decoder().layers
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_compiled_call_impl", None)


@contextmanager
def liger(model: PreTrainedModel) -> Iterator[None]:
    """Liger's Triton RMSNorm, rotary embedding and SwiGLU."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.models.qwen2 import modeling_qwen2

    names = ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP")
    globals_before = {name: getattr(modeling_qwen2, name) for name in names}
    modules_before = [(module, dict(vars(module))) for module in model.modules()]
    MODEL_TYPE_TO_APPLY_LIGER_FN["qwen2"](model=model, fused_linear_cross_entropy=False)
    try:
        yield
    finally:
        for name, value in globals_before.items():
            setattr(modeling_qwen2, name, value)
        for module, before in modules_before:
            for name in set(vars(module)) - set(before):
                delattr(module, name)
