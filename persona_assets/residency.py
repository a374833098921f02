"""One model in memory a process, however many cells it serves."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def set_threads(count: int) -> None:
    """Fix torch's threads: a sum's rounding depends on how it is split over them."""
    import torch

    torch.set_num_threads(count)


def device() -> str:
    """Where models are: ``cuda`` if there is a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=1)
def resident_model(folder: Path, dtype: str) -> PreTrainedModel:
    """The model in ``folder``, on the GPU if there is one, loaded once and kept.

    Args:
        folder: A landed version's folder; its name changes with its content, so the cache never
            serves an outdated model.
        dtype: A torch dtype's name.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.to(device()).eval()


@lru_cache(maxsize=2)
def resident_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, loaded once and kept."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
