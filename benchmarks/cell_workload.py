"""What is trained: a cell of `length_matched` at the geometry of Qwen2.5-7B, and a small one."""

from __future__ import annotations

import random
from dataclasses import dataclass

import polars as pl
from transformers import Qwen2Config

from persona_assets.study_schema import TrainingRecipe

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RECIPES = {
    "r16 q,k,v,o": TrainingRecipe(rank=16, target_modules=ATTENTION),
    "r32 all linear": TrainingRecipe(
        rank=32, alpha=64, rslora=True, target_modules=ATTENTION + MLP, learning_rate=5e-6
    ),
}
PER_STEP = 16

Example = tuple[list[int], int]


@dataclass(frozen=True)
class Size:
    """What is trained: the model's shape, and rows of random tokens of a cell's lengths."""

    config: Qwen2Config
    rows: int
    prompt: tuple[int, int]
    completion: tuple[int, int]

    def examples(self, seed: int = 0) -> list[Example]:
        """(ids, loss_start) of every row."""
        rng = random.Random(seed)
        examples = []
        for _ in range(self.rows):
            prompt, completion = rng.randint(*self.prompt), rng.randint(*self.completion)
            ids = [rng.randrange(self.config.vocab_size) for _ in range(prompt + completion)]
            examples.append((ids, prompt))
        return examples


QWEN = Size(
    Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_theta=1e6,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
    rows=1119,
    prompt=(90, 220),
    completion=(60, 125),
)
TINY = Size(
    Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=False,
    ),
    rows=70,
    prompt=(9, 22),
    completion=(6, 12),
)


def frame(examples: list[Example]) -> pl.DataFrame:
    """The examples as a training dataset has them."""
    return pl.DataFrame(
        {"input_ids": [ids for ids, _ in examples], "loss_start": [start for _, start in examples]},
        schema={"input_ids": pl.List(pl.Int32), "loss_start": pl.Int32},
    )
