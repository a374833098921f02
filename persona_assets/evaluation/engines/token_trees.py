"""Token trees: a batch of key-value caches whose rows each hold a trunk and its branches.

Prompts that differ in their endings share a *trunk*, the tokens that they begin with; a *branch*
is what one of them adds. All branches of a trunk live in one row of the cache: a token sees the
trunk and its own branch, by its position and not by its place in the row. So the trunk is computed
and stored once, and branches of unequal length cost no padding.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Whose token a slot or an input holds, where it is no branch's (those count from 0).
TRUNK, NOBODY = -1, -2
#: The position of padding: after every token's, hence never seen.
_NOWHERE = torch.iinfo(torch.long).max


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that continue a branch after the first ``start`` tokens of its path.

    Attributes:
        owner: The branch's number in its row.
        tokens: At least one token.
        start: How many tokens of trunk and branch stand before them; what the row holds of the
            branch beyond that is not seen.
    """

    owner: int
    tokens: list[int]
    start: int


@dataclass(slots=True)
class Step:
    """Inputs of one forward pass, each [rows, tokens]: the first rows of the batch.

    Attributes:
        ids: Token ids.
        owner: The branch a token belongs to, or ``NOBODY``.
        position: Its position in its path.
        start: Slots at this position and after are not seen.
    """

    ids: torch.Tensor
    owner: torch.Tensor
    position: torch.Tensor
    start: torch.Tensor


class TokenTrees:
    """The trees of one batch; to be used under ``torch.inference_mode``.

    Args:
        model: A causal language model with full attention in every layer.
        trunks: Token ids of each row's trunk; may be empty.
        room: Tokens a row to reserve for the branches; what exceeds it costs a copy a step.
    """

    def __init__(self, model: PreTrainedModel, trunks: Sequence[Sequence[int]], room: int):
        self._model = model
        slots = max(1, *map(len, trunks))
        n_layers = model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[_ReservedLayer(slots + room) for _ in range(n_layers)])
        #: Which trunk each row of the cache holds.
        self.order = list(range(len(trunks)))
        # Right-padded, a causal pass needs no mask: no token of a trunk sees the padding.
        self._call([[*trunk, *[0] * (slots - len(trunk))] for trunk in trunks], self._tensor([]))
        lengths = self._tensor([len(trunk) for trunk in trunks])[:, None]
        position = torch.arange(slots, device=lengths.device).expand(len(trunks), slots)
        self._position = position.where(position < lengths, _NOWHERE)
        self._owner = torch.full_like(position, TRUNK)

    def pack(self, rows: Sequence[Sequence[Branch]]) -> Step:
        """Several branches a row, left-padded, the last token of each at the end, in order."""
        width = max(sum(len(branch.tokens) for branch in row) for row in rows)
        packed = [_pack_row(row, width) for row in rows]
        return Step(*(self._tensor([[t[i] for t in row] for row in packed]) for i in range(4)))

    def forward(self, step: Step, keep: int) -> torch.Tensor:
        """Run and store a step's tokens; logits [rows, keep, vocabulary] of the last ``keep``."""
        n = len(step.ids)
        owner, position = self._owner[:n, None], self._position[:n, None]
        mine = (owner == TRUNK) | (owner == step.owner[..., None])
        sees_stored = mine & (position < step.start[..., None])
        sees_new = (step.owner[:, None] == step.owner[..., None]) & (
            step.position[:, None] <= step.position[..., None]
        )
        hidden = ~torch.cat([sees_stored, sees_new], dim=-1)[:, None]
        dtype = self._model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
        logits = self._call(
            step.ids,
            keep,
            position_ids=step.position,
            attention_mask=mask.masked_fill_(hidden, torch.finfo(dtype).min),
        )
        self._owner = _append(self._owner, step.owner, NOBODY)
        stored = step.position.masked_fill(step.owner == NOBODY, _NOWHERE)
        self._position = _append(self._position, stored, _NOWHERE)
        return logits

    def retire(self, n: int, gone: Collection[int]) -> list[int]:
        """Move the rows ``gone`` of the first ``n`` behind the others, which then come first.

        Returns:
            Where each of the rows that stay in front stood before.
        """
        left = n - len(gone)
        stay = iter([row for row in range(left, n) if row not in gone])
        moves = [(row, next(stay)) for row in range(left) if row in gone]
        if moves:
            front, back = map(list, zip(*moves))
            to, origin = front + back, back + front
            for x in (self._owner, self._position, *self._stored()):
                x[to] = x[origin]
            for row, other in moves:
                self.order[row], self.order[other] = self.order[other], self.order[row]
        moved = dict(moves)
        return [moved.get(row, row) for row in range(left)]

    def _stored(self) -> list[torch.Tensor]:
        length = self._owner.shape[1]
        return [
            x[:, :, :length] for layer in self._cache.layers for x in (layer.keys, layer.values)
        ]

    def _call(self, ids: Any, keep: int | torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        return self._model(
            input_ids=torch.as_tensor(ids, device=self._model.device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
            **inputs,
        ).logits

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._model.device)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first items two sequences share."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i, (x, y) in enumerate(zip(a, b)) if x != y)


def _pack_row(row: Sequence[Branch], width: int) -> list[tuple[int, int, int, int]]:
    paths = [
        [(token, b.owner, position, b.start) for position, token in enumerate(b.tokens, b.start)]
        for b in row
    ]
    packed = [token for path in paths for token in path[:-1]] + [path[-1] for path in paths]
    return [(0, NOBODY, 0, 0)] * (width - len(packed)) + packed


def _append(x: torch.Tensor, new: torch.Tensor, fill: int) -> torch.Tensor:
    """``x`` [rows, slots] with ``new`` after its first rows, and ``fill`` after the others."""
    rest = new.new_full((len(x) - len(new), new.shape[1]), fill)
    return torch.cat([x, torch.cat([new, rest])], dim=1)


class _ReservedLayer(DynamicLayer):
    """A layer of a cache whose memory is reserved once and filled in place.

    ``DynamicLayer`` concatenates, which copies the whole cache at each step: for a small model
    that takes longer than the model itself.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Reserve; zeroed, since what is masked must still be finite."""
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = (
            x.new_zeros(*x.shape[:2], self.capacity, x.shape[-1])
            for x in (key_states, value_states)
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the first rows; their keys and values so far, [rows, heads, tokens, size]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n, before = len(key_states), self.length
        self.length += key_states.shape[-2]
        if self.length > self.keys.shape[-2]:
            pad = (0, 0, 0, self.length - self.keys.shape[-2])
            self.keys, self.values = (
                torch.nn.functional.pad(x, pad) for x in (self.keys, self.values)
            )
        self.keys[:n, :, before : self.length] = key_states
        self.values[:n, :, before : self.length] = value_states
        return self.keys[:n, :, : self.length], self.values[:n, :, : self.length]

    def get_seq_length(self) -> int:
        """Tokens held so far."""
        return self.length
