"""What runs in vLLM's own process: a checkpoint's weights put into the resident model, and back.

vLLM mixes :class:`ResidentModel` into its worker and calls it by name; nothing is pickled. A
module is changed by loading it anew from tensors named as in a checkpoint: vLLM processes them as
it did at first (its CPU kernels pack them) and writes them where they stood, so that captured CUDA
graphs stay good. The base's tensors always come from its files: what is put back is exact by
construction.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_assets.training.checkpoints import Update, is_adapter, matrix_shapes, read_updates
from persona_assets.training.headers import (
    MODEL_INDEX,
    MODEL_WEIGHTS,
    read_header,
    read_index,
)

if TYPE_CHECKING:
    import torch

#: Names, to the engine's processes, the one that started them.
STARTER = "PERSONA_ASSETS_VLLM_STARTER"
#: A whole model's output head, as checkpoints name it.
HEAD = "lm_head.weight"
#: Seconds between two looks at whether that one still lives.
_WATCH = 0.5


class ModelFiles:
    """The tensors of a whole model's folder, read (mapped, not copied) as they are asked for."""

    def __init__(self, folder: Path):
        index = folder / MODEL_INDEX
        single = (folder / MODEL_WEIGHTS).is_file() or not index.is_file()
        names = {MODEL_WEIGHTS: set(read_header(folder / MODEL_WEIGHTS))} if single else None
        self._files = {
            tensor: folder / file
            for file, tensors in sorted((names or read_index(index)).items())
            for tensor in sorted(tensors)
        }
        self._open: dict[Path, Any] = {}
        self._pinned: dict[str, torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        if name in self._pinned:
            return self._pinned[name]
        path = self._files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(name)

    def pin(self, names: Iterable[str]) -> None:
        """Keep exactly ``names`` in page-locked memory, from which a GPU reads at full speed."""
        names = set(names)
        self._pinned = {name: held for name, held in self._pinned.items() if name in names}
        for name in names - self._pinned.keys():
            self._pinned[name] = self[name].pin_memory()


def modules_of(
    targets: Iterable[str], fused: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """The resident model's modules that hold ``targets``, each with the base's that it is made of.

    Args:
        targets: Modules by their full names in the base.
        fused: The last part of a resident module's name, and those that it fuses, in order. One
            of them cannot be loaded without the others.
    """
    whole = {part: (name, parts) for name, parts in fused.items() for part in parts}
    modules = {}
    for target in targets:
        parent, _, last = target.rpartition(".")
        name, parts = whole.get(last, (last, (last,)))
        stem = f"{parent}." if parent else ""
        modules[stem + name] = tuple(stem + part for part in parts)
    return modules


def tensor_names(parts: Iterable[str], base: Iterable[str]) -> list[str]:
    """Weights and biases of some of the base's modules, of those that it has."""
    names = [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    known = set(base)
    return [name for name in names if name in known]


def adapted_tensors(
    names: Iterable[str],
    base: ModelFiles | Mapping[str, torch.Tensor],
    updates: Mapping[str, Update],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's tensors ``names`` on ``device``, the updated weights with what is added to them.

    Args:
        names: The tensors, in the order in which they are to be loaded.
        base: The base's tensors.
        updates: What is added, by module; none for the base itself.
        device: Where the sum is computed, in float32.
        dtype: The model's: base and sum are each rounded to it once, as they are in a model that
            ``transformers`` loads and ``checkpoints.adapted`` merges into.
    """
    for name in names:
        tensor = base[name].to(device, dtype, non_blocking=True)
        update = updates.get(name.removesuffix(".weight"))
        yield name, tensor if update is None else update.added_to(tensor)


class ResidentModel:
    """What is added to vLLM's worker; its names must not occur there."""

    if TYPE_CHECKING:
        model_runner: Any
        vllm_config: Any

    #: What the last checkpoint changed: modules, or all that there is (None).
    merged_into: Mapping[str, Sequence[str]] | None = {}

    def describe_model(self) -> dict[str, str]:
        """What the numbers may depend on and only the worker knows."""
        model = self.model_runner.get_model()
        dtype = self.model_runner.model_config.dtype
        # vLLM before 0.30 has no head of another dtype and ignores that one is asked for.
        head = getattr(getattr(model, "logits_processor", None), "head_dtype", None) or dtype
        backends = {
            module.attn_backend.get_name()
            for module in model.modules()
            if getattr(module, "attn_backend", None) is not None
        }
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "head_dtype": str(head).removeprefix("torch."),
            "device": next(model.parameters()).device.type,
            "attention": "+".join(sorted(backends)),
        }

    def merge_checkpoint(self, base: str, checkpoint: str) -> None:
        """Serve what a checkpoint's folder holds, an adapter or a whole model, until it is undone.

        Args:
            base: The base's folder.
            checkpoint: The checkpoint's, already looked at (``checkpoints.check_checkpoint``).
        """
        files, folder = self._base_files(base), Path(checkpoint)
        if is_adapter(folder):
            device = str(next(self.model_runner.get_model().parameters()).device)
            updates = read_updates(folder, matrix_shapes(Path(base)), device)
            self.merged_into = self._modules(updates)
            self._load(self.merged_into, files, updates)
        else:
            self.merged_into = None
            self._load(None, ModelFiles(folder), {})

    def unmerge_checkpoint(self, base: str) -> None:
        """Put back the base's own tensors wherever the last checkpoint changed them."""
        self._load(self.merged_into, self._base_files(base), {})

    def _base_files(self, base: str) -> ModelFiles:
        if not hasattr(self, "base_files"):
            self.base_files = ModelFiles(Path(base))
        return self.base_files

    def _modules(self, targets: Iterable[str]) -> dict[str, tuple[str, ...]]:
        model = self.model_runner.get_model()
        return modules_of(targets, getattr(model, "packed_modules_mapping", {}))

    def _load(
        self,
        modules: Mapping[str, Sequence[str]] | None,
        files: ModelFiles,
        updates: Mapping[str, Update],
    ) -> None:
        """Load some modules anew, or all of them (None), from files and what is added to them."""
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        model, config = self.model_runner.get_model(), self.model_runner.model_config
        device = next(model.parameters()).device
        if modules is None:
            # A tied head is the embeddings, saved once or twice.
            tied = config.hf_text_config.tie_word_embeddings
            roots, names = [model], [name for name in files if not (tied and name == HEAD)]
        else:
            roots = [model.get_submodule(name) for name in modules]
            names = [name for parts in modules.values() for name in tensor_names(parts, files)]
            if device.type == "cuda":
                files.pin(names)
        tensors = adapted_tensors(names, files, updates, device, config.dtype)
        with torch.no_grad(), set_current_vllm_config(self.vllm_config), _quiet():
            for root in roots:
                initialize_layerwise_reload(root)
            try:
                model.load_weights(tensors)
            finally:
                for root in roots:
                    finalize_layerwise_reload(root, config)
            if modules is None:
                # A CPU's kernels read a packed copy of the head, which is not made anew where the
                # head is tied: it is not loaded, its weight is the embeddings'.
                model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
            if device.type == "cuda":
                torch.cuda.synchronize()


class _quiet:
    """vLLM warns of each module that a reload leaves as it is, which is meant here."""

    _log = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def __enter__(self) -> None:
        self.level = self._log.level
        self._log.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._log.setLevel(self.level)


def _end_with_starter() -> None:
    """In the engine's process, see to it that it ends when the one that started it does.

    A killed process says nothing, and the engine that it leaves would wait for requests, the GPU's
    memory in its hands, for ever. Watched from the import of this module on, since loading takes
    minutes. On a CPU the worker is a process of its own between the two: without it the engine
    ends.
    """
    starter = os.environ.get(STARTER, "")

    def lives() -> bool:
        parent = os.getppid()
        return starter in (str(parent), _parent(parent))

    def watch() -> None:
        while lives():
            time.sleep(_WATCH)
        os.kill(os.getpid(), signal.SIGKILL)

    if starter and starter != str(os.getpid()):
        threading.Thread(target=watch, name="end-with-starter", daemon=True).start()


def _parent(pid: int) -> str:
    """The parent's id of a process; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[1]
    except OSError:
        return ""


_end_with_starter()
