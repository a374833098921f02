"""A small miniature world with its tokenizer and a small model, shared by the training tests."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import polars as pl
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from persona_assets.questions.miniature import World
from persona_assets.rationales.condition import write_condition
from persona_assets.rationales.miniature import MiniatureWriter
from persona_assets.study import Cell, Study
from persona_assets.training.dataset import build_dataset
from persona_assets.training.miniature_tokenizer import build_tokenizer

WORLD = World(186, 16)
QUESTIONS = WORLD.questions(20)
TRAIN = [q for q in QUESTIONS if q.split == "train"]
WRITER = MiniatureWriter()


@lru_cache
def tokenizer():
    return build_tokenizer(WORLD)


def rationales(study: Study, condition: str) -> pl.DataFrame:
    return write_condition(study, condition, QUESTIONS, tokenizer(), WRITER)[0]


def dataset(study: Study, cell: Cell, frame: pl.DataFrame | None = None) -> pl.DataFrame:
    frame = rationales(study, cell.condition) if frame is None else frame
    return build_dataset(study, cell, QUESTIONS, frame, tokenizer())


def model(seed: int = 0, **options) -> Qwen2ForCausalLM:
    return random_model(
        len(tokenizer()),
        seed,
        **{
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
        }
        | options,
    )


def random_model(vocab_size: int, seed: int, **options) -> Qwen2ForCausalLM:
    """Two random layers of width 32, in float32, where ``options`` ask for nothing else."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = Qwen2Config(vocab_size=vocab_size, **sizes | options)
    return Qwen2ForCausalLM(config).eval()


def random_adapter(model: PreTrainedModel, folder: Path, **options) -> Path:
    """Save an adapter of ``model``, which is used up: neither of its factors is zero."""
    torch.manual_seed(1)
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **options)
    adapted = get_peft_model(model, config)
    config.init_lora_weights = True  # a checkpoint that asks for anything else is refused
    adapted.save_pretrained(folder)
    return folder
