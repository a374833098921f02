"""Whether the resident base model is still what was loaded: its logits on a few fixed prompts.

One base serves every cell, and each cell's checkpoint is merged into it and taken out again: a
weight left changed would shift every cell after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from persona_assets.audit import Audit, audit
from persona_assets.chat import chat_prompt, encode
from persona_assets.evaluation.protocol import letter_prompt
from persona_assets.evaluation.scaffolds import SCAFFOLDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Prompts that are read; each runs through every matrix of every layer.
_N_PROMPTS = 3
_USER = "Which letter comes first?\n\n(A) A\n(B) B"


def probe_prompts(
    tokenizer: PreTrainedTokenizerBase, personas: Mapping[str, str]
) -> tuple[str, ...]:
    """One fixed question asked of the first personas: whole strings that end in the anchor.

    Args:
        tokenizer: The model's, for its chat template.
        personas: System prompt of each persona.
    """
    systems = islice(personas.values(), _N_PROMPTS)
    return tuple(
        letter_prompt(chat_prompt(tokenizer, system, _USER), SCAFFOLDS["no_cot"])
        for system in systems
    )


def probe(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
) -> np.ndarray:
    """The next token's logits after each prompt, computed alone so that no batch moves them.

    Returns:
        [prompts, vocabulary] in float32, into which the model's dtype goes without rounding.
    """
    import torch

    rows = []
    with torch.inference_mode():
        for ids in encode(tokenizer, list(prompts)):
            tokens = torch.tensor([ids], device=model.device)
            logits = model(input_ids=tokens, logits_to_keep=1, use_cache=False).logits
            rows.append(logits[0, -1].float().cpu().numpy())
    return np.stack(rows)


def base_unchanged_audit(before: np.ndarray, after: np.ndarray) -> Audit:
    """Whether the base's logits are, to the last bit, those it had when it was loaded.

    Args:
        before: What the host's probe read when the base was loaded.
        after: What it reads now that the checkpoint is taken out, of the same prompts.
    """
    same = before.view(np.uint32) == after.view(np.uint32)
    moved = int((~same).any(axis=1).sum())
    # In float64: a difference of two large values must not overflow; not-a-number stays itself.
    largest = float(np.abs(after.astype(np.float64) - before)[~same].max()) if moved else 0.0
    return audit(
        "base_unchanged",
        not moved,
        observed=f"the logits of {moved} of {len(before)} prompts differ from those at loading, "
        f"by at most {largest:.3g}",
        threshold="0 prompts: equal to the last bit",
        remedy="Restart the process, so that the base is loaded again, and evaluate every cell "
        "since the last that passed.",
    )
