"""From (system prompt, user turn) to the text a chat model continues."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_prompt(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> str:
    """The tokenizer's chat template applied, up to where the assistant's turn begins."""
    return tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, {"role": "user", "content": user}],
        tokenize=False,
        add_generation_prompt=True,
    )


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each whole text, special tokens as written in it and none added.

    Whole texts only: ids are never concatenated, because a tokenizer may merge across the
    seam (``.\\n</`` and ``>\\n\\n`` are other tokens than their parts).
    """
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
