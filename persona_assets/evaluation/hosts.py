"""Hosts: what keeps a base model in memory and lends engines over it, checkpoint after checkpoint.

Every engine answers the same prompt groups (see :mod:`.protocol`); which one does is a study's
setting, ``evaluation.engine``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from persona_assets import environment, residency
from persona_assets.evaluation.protocol import Engine, end_of_turn_ids
from persona_assets.hashing import module_hashes, sha256_json
from persona_assets.study import Study


class Host(Protocol):
    """A resident base model that checkpoints are served on."""

    def serving(self, checkpoint: Path | None) -> AbstractContextManager[Engine]:
        """An engine over the base, or over the base under a checkpoint.

        One at a time: requests of two checkpoints never meet in a batch. Afterwards, also if the
        body raises, the base is what it was.

        Args:
            checkpoint: A folder with a LoRA adapter or with a whole merged model; None for the
                base itself.

        Raises:
            CheckpointError: the checkpoint does not fit the base.
        """
        ...

    def probe(self, prompts: Sequence[str]) -> np.ndarray:
        """What the base says after each prompt, computed alone so that no batch moves it.

        Returns:
            [prompts, values] in float32: equal to the last bit as long as the base is unchanged.
        """
        ...

    def first_reading(self, prompts: Sequence[str]) -> np.ndarray:
        """What :meth:`probe` gave when the base was first asked these prompts."""
        ...

    def base_holds(self) -> bool:
        """Whether the base still says all that it said when it was first asked."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


class FirstReadings:
    """What a host's base said when it was first asked: it must say so for as long as it is there.

    Kept with the host, or for hosts that come and go over one resident model, with that.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, ...], np.ndarray] = {}

    def of(self, host: Host, prompts: Sequence[str]) -> np.ndarray:
        """The first reading of these prompts (see ``Host.probe``)."""
        if tuple(prompts) not in self._kept:
            self._kept[tuple(prompts)] = host.probe(prompts)
        return self._kept[tuple(prompts)]

    def hold(self, host: Host) -> bool:
        """Whether the base still says all that it said, to the last bit."""
        return all(
            np.array_equal(first.view(np.uint32), host.probe(prompts).view(np.uint32))
            for prompts, first in self._kept.items()
        )


#: The sources that an answer depends on, where another process may run an older version of them.
_CODE = (
    *("chat", "evaluation.protocol", "evaluation.scaffolds", "evaluation.server"),
    *("evaluation.engines.vllm", "evaluation.engines.vllm_launch"),
    *("evaluation.engines.vllm_worker", "evaluation.engines.wire"),
    "training.checkpoints",
)


class NoEngine(RuntimeError):
    """The engine that a study asks for cannot be had here."""


def open_host(study: Study, base: Path, tokenizer: Path) -> Host:
    """The host that the study's evaluation settings ask for, over its landed base model.

    Args:
        base: The base model's folder.
        tokenizer: The tokenizer's folder.

    Raises:
        NoEngine: vLLM is not installed, or the server serves something else.
        NoFreeGpu: other processes hold every GPU.
        Unavailable: no server answers.
    """
    residency.set_threads(study.compute.threads)
    if study.evaluation.engine == "vllm_server":
        from persona_assets.evaluation.engines.remote import RemoteHost

        return RemoteHost(environment.engine_url(), identity(study, base, tokenizer))
    settings = host_settings(study, base)
    if study.evaluation.engine == "transformers":
        from persona_assets.evaluation.engines.transformers import TransformersHost

        on = residency.device(study.wants_gpu)
        return TransformersHost(base, tokenizer, device=on, **settings)
    return local_vllm(study, base, tokenizer)


def local_vllm(study: Study, base: Path, tokenizer: Path) -> Host:
    """vLLM in this process's care, started once and kept (its start takes a minute or two).

    Raises:
        NoEngine: vLLM is not installed.
        NoFreeGpu: other processes hold every GPU.
    """
    if find_spec("vllm") is None:
        raise NoEngine(
            "evaluation.engine: vLLM is not installed: `pip install '.[gpu]'` on a "
            "machine with a GPU, or set the engine to transformers"
        )
    residency.device(study.wants_gpu)
    settings = host_settings(study, base)

    def load() -> Host:
        from persona_assets.evaluation.engines.vllm import VllmHost

        return VllmHost(base, tokenizer, max_rank=_max_rank(study), **settings)

    key = ("vllm", base, tokenizer, _max_rank(study), *sorted(settings.items()))
    return residency.resident(key, load, lambda host: host.close())


def host_settings(study: Study, base: Path) -> dict[str, Any]:
    """What every local host is told of the study's settings."""
    settings = study.evaluation
    return {
        "dtype": settings.dtype,
        "serving": settings.serving,
        "max_rationale_tokens": settings.max_rationale_tokens,
        "batch_size": settings.batch_size,
        "eos_token_ids": end_of_turn_ids(base),
    }


def identity(study: Study, base: Path, tokenizer: Path) -> dict[str, Any]:
    """What a server must be serving for its answers to be this study's.

    The folders stand for their content: a landed version's name changes with it.
    """
    folders = {"base": str(base), "tokenizer": str(tokenizer)}
    code = {"code": sha256_json(module_hashes(*_CODE)), "max_rank": _max_rank(study)}
    return folders | host_settings(study, base) | code


def _max_rank(study: Study) -> int:
    """The largest rank of an adapter that the study's cells may have."""
    return max(study.recipe(cell).rank for cell in study.cells)
