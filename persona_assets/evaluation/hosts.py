"""Hosts: what keeps a base model in memory and lends engines over it, checkpoint after checkpoint.

Every engine answers the same prompt groups (see :mod:`.protocol`); which one does is a study's
setting, ``evaluation.engine``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from persona_assets.evaluation.protocol import Engine

if TYPE_CHECKING:
    import numpy as np


class Host(Protocol):
    """A resident base model; a host's constructor takes a :class:`HostSpec` and loads the base."""

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

    def close(self) -> None:
        """Give its memory back."""
        ...
