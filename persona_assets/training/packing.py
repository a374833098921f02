"""Packs: examples laid one after another without padding, none of which sees another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_ATTENTION = "packed"
#: Releases of torch before 2.13 let query heads share key heads without being asked.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


@dataclass(frozen=True, slots=True)
class Pack:
    """Some examples of one step, on the model's device.

    Attributes:
        ids: Token ids, int64 (1, tokens): every example without its last token, which is only
            predicted.
        positions: Each token's place in its own example, int64 (1, tokens).
        bounds: Where examples begin, and the end of the last, int32 (examples + 1).
        longest: Tokens of the longest example.
        scored: Places in ``ids`` whose next token bears loss, int64 (loss tokens).
        targets: Those next tokens, int64 (loss tokens).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    longest: int
    scored: torch.Tensor
    targets: torch.Tensor


def pack(examples: Sequence[tuple[list[int], int]], device: torch.device) -> Pack:
    """Lay out (ids, loss_start) pairs; the loss is on ``ids[loss_start:]``, loss_start from 1."""
    lengths = [len(ids) - 1 for ids, _ in examples]
    starts = [0, *accumulate(lengths)]
    rows = list(zip(examples, starts, lengths))

    def tensor(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype).to(device)

    return Pack(
        ids=tensor([token for ids, _ in examples for token in ids[:-1]])[None],
        positions=tensor([place for length in lengths for place in range(length)])[None],
        bounds=tensor(starts, torch.int32),
        longest=max(lengths),
        scored=tensor([p for (_, s), at, n in rows for p in range(at + s - 1, at + n)]),
        targets=tensor([token for ids, start in examples for token in ids[start:]]),
    )


def pack_loss(model: PreTrainedModel, pack: Pack) -> torch.Tensor:
    """Summed cross-entropy in nats over the pack's loss tokens; the head sees no other position.

    The model must be under :func:`packed_attention`.
    """
    hidden = model.get_decoder()(
        input_ids=pack.ids,
        position_ids=pack.positions,
        use_cache=False,
        cu_seq_lens_q=pack.bounds,
        max_length_q=pack.longest,
    ).last_hidden_state
    logits = model.get_output_embeddings()(hidden[0].index_select(0, pack.scored))
    exact = torch.promote_types(logits.dtype, torch.float32)
    return functional.cross_entropy(logits.to(exact), pack.targets, reduction="sum")


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention keep to the bounds of packs, and put its own back afterwards."""
    from transformers import AttentionInterface

    # No mask function of that name is registered: the model then builds no mask.
    AttentionInterface.register(PACKED_ATTENTION, _attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(PACKED_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Compile the decoder's layers, if attention has its kernel on the model's device and dtype.

    One by one and for any lengths, so that all layers, packs and later cells share one graph. For
    that the embeddings ask for a gradient as the layers' outputs do: a second graph for the first
    layer alone would cost more than all that it could leave out.
    """
    if not _has_kernel(model):
        yield
        return
    layers = model.get_decoder().layers
    model.enable_input_require_grads()
    for layer in layers:
        layer.compile(dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer._compiled_call_impl
        model.disable_input_require_grads()


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each example: (1, heads, tokens, d) to (1, tokens, heads, d).

    In one kernel where there is one for it, else example by example.
    """
    if dropout or sliding_window is not None:
        raise ValueError("packed training knows neither attention dropout nor sliding windows")
    if _has_kernel(query):
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        bounds, longest = cu_seq_lens_q, max_length_q
        causal = (-1, 0)
        out = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=causal, **_GROUPED
        )
        return out[None], None
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _has_kernel(of: torch.Tensor | PreTrainedModel) -> bool:
    """Whether torch attends over variable lengths at once: FlashAttention's devices and dtypes."""
    return of.device.type == "cuda" and of.dtype in (torch.bfloat16, torch.float16)
