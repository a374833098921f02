"""One model in memory a process, however many cells it serves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from persona_assets import gpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
T = TypeVar("T")

#: What fills the memory of this process: what it is, the thing, and how to be rid of it.
_resident: tuple[Hashable, object, Callable[[], None]] | None = None


def set_threads(count: int) -> None:
    """Fix torch's threads: a sum's rounding depends on how it is split over them."""
    import torch

    torch.set_num_threads(count)


def device(wants_gpu: bool) -> Device:
    """Where models are: on this process's GPU, if they want one and there is one.

    Raises:
        NoFreeGpu: other processes hold every GPU.
        RuntimeError: torch cannot use the one that there is.
    """
    if not wants_gpu:
        return "cpu"
    if gpus.lease() is None:
        log.warning("there is no GPU: the study's models run on the processor")
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} sees no GPU although the machine has one: install a build "
            "for CUDA, or set CUDA_VISIBLE_DEVICES to nothing to run on the processor"
        )
    return "cuda"


def resident(key: Hashable, load: Callable[[], T], close: Callable[[T], None]) -> T:
    """The thing that ``key`` names, loaded once and kept until another one is asked for.

    What was resident before is given back first: two models of billions of parameters do not fit
    side by side.

    Args:
        key: What it is; equal keys are the same thing.
        load: Loads it.
        close: Gives back what letting go of it does not.
    """
    global _resident
    if _resident is not None and _resident[0] == key:
        return _resident[1]
    release()
    thing = load()
    _resident = (key, thing, lambda: close(thing))
    return thing


def release() -> None:
    """Give back the memory of what is resident."""
    global _resident
    if _resident is None:
        return
    close, _resident = _resident[2], None
    close()
    del close
    gc.collect()
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_model(folder: Path, dtype: str, on: Device = "cpu") -> PreTrainedModel:
    """The model in ``folder``, resident on ``on``.

    Args:
        folder: A landed version's folder; its name changes with its content, so that an outdated
            model is never served.
        dtype: A torch dtype's name.
        on: Where it is.
    """

    def load() -> PreTrainedModel:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        if on == "cpu":  # its weights are pages of the file, and would change along with that
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        return model.to(on).eval()

    return resident(("model", folder, dtype, on), load, lambda model: None)


@lru_cache(maxsize=2)
def resident_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, loaded once and kept."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
