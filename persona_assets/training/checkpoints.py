"""LoRA checkpoints on disk: what a folder must hold, and lending one to the resident base model.

A checkpoint from elsewhere is looked at before it is loaded: names, shapes and sizes come from
the safetensors header, and nothing that unpickles is ever opened.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_assets.audit import Audit, audit
from persona_assets.hashing import sha256_file, sha256_lines
from persona_assets.training.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persona_assets.training.resident import borrowed, linear_shapes, named_by

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The two files of an adapter, and all that its hash covers.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: Largest header or configuration read, in bytes; an adapter of a 7B model needs about 0.1 MB.
_MAX_JSON = 10_000_000
#: PEFT options that change what an adapter's tensors mean; none is used here, so none is read.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "layers_to_transform": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class CheckpointError(ValueError):
    """A checkpoint folder that must not be loaded; names file, tensor or field, and remedy."""


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a LoRA adapter (rather than a whole model)."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_hash(folder: Path) -> str:
    """SHA-256 over the adapter's two files: the name an adapter goes by.

    Raises:
        CheckpointError: one of them is missing.
    """
    return sha256_lines(f"{name} {sha256_file(_existing(folder / name))}" for name in ADAPTER_FILES)


def checkpoint_hash(folder: Path) -> str:
    """SHA-256 of a checkpoint: of an adapter's two files, or of a whole model's.

    Raises:
        CheckpointError: the folder holds neither.
    """
    if is_adapter(folder):
        return adapter_hash(folder)
    names = sorted(p.name for suffix in ("json", "safetensors") for p in folder.glob(f"*.{suffix}"))
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(f"{folder}: holds no safetensors file: fetch the checkpoint again")
    return sha256_lines(f"{name} {sha256_file(folder / name)}" for name in names)


@contextmanager
def adapted(base_model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """The resident base model with the adapter of ``folder`` merged into its weights.

    Afterwards, also if the body raises, the base is bit-identical to what it was.

    Raises:
        CheckpointError: the adapter does not fit the base, or holds a value that is not finite.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    targets = check_adapter(folder, linear_shapes(base_model))
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: tensor {name} is not finite: train the cell again"
            )
    with borrowed(base_model, changing=targets):
        yield PeftModel.from_pretrained(base_model, str(folder)).merge_and_unload()


def fits_base(folder: Path, base_folder: Path) -> Audit:
    """``adapter_fits_base``: names and shapes of the adapter against the base model's files."""
    try:
        shapes = {
            name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
            for path in sorted(base_folder.glob("*.safetensors"))
            for name, tensor in read_header(path).items()
            if name.endswith(".weight") and len(tensor.shape) == 2
        }
        targets = check_adapter(folder, shapes)
        found, fault = f"{len(targets)} modules adapted, each of the base's shape", ""
    except CheckpointError as error:
        found, fault = str(error), str(error)
    return audit(
        "adapter_fits_base",
        not fault,
        observed=found,
        threshold="a plain LoRA adapter of the base's own modules, in safetensors",
        remedy="Fetch or train the checkpoint again, for this base model.",
    )


def check_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Look at an adapter without loading it; the names of the modules it adapts.

    Args:
        folder: The adapter's folder.
        shapes: (out, in) features of the base model's linear modules, by full name.

    Raises:
        CheckpointError: a file is missing, pickled or damaged; an option is not plain LoRA; or
            a tensor is missing, unexpected, or of another shape.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path}: pickled weights are never loaded: save the adapter as safetensors"
            )
    rank, suffixes = _read_config(folder / ADAPTER_CONFIG)
    targets = [name for name in shapes if named_by(name, suffixes)]
    path = folder / ADAPTER_WEIGHTS
    expected: dict[str, tuple[int, ...]] = {}
    for name in targets:
        out_features, in_features = shapes[name]
        expected[f"base_model.model.{name}.lora_A.weight"] = (rank, in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (out_features, rank)
    found = read_header(path)
    for name in sorted(expected.keys() | found.keys()):
        here = found[name].shape if name in found else None
        if here != expected.get(name):
            raise CheckpointError(
                f"{path}: tensor {name}: expected {_shape(expected.get(name))}, found "
                f"{_shape(here)}: use an adapter of this base model"
            )
    return targets


def read_header(path: Path) -> dict[str, _Tensor]:
    """Names, dtypes and shapes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: it is no such file, or its size is not what the header says.
    """
    size = _existing(path).stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(size - 8, _MAX_JSON):
            raise CheckpointError(f"{path}: is no safetensors file: fetch or train it again")
        header = _json_object(path, file.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].span):
        nbytes = _DTYPE_BYTES[tensor.dtype] * math.prod(tensor.shape)
        if tensor.span != (end, end + nbytes):
            raise CheckpointError(f"{path}: tensor {name}: bytes {tensor.span} do not fit it")
        end += nbytes
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path}: has {size} bytes where its header asks for {8 + length + end}: "
            "fetch or train it again"
        )
    return tensors


def _tensor(path: Path, name: str, entry: Any) -> _Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(a), int(b)]} if (
            dtype in _DTYPE_BYTES and all(type(n) is int and n >= 0 for n in shape)
        ):
            return _Tensor(dtype, tuple(shape), (a, b))
    raise CheckpointError(
        f"{path}: tensor {name}: is not a {', '.join(_DTYPE_BYTES)} tensor: {str(entry)[:80]}"
    )


def _read_config(path: Path) -> tuple[int, list[str]]:
    """(rank, target modules) of a plain LoRA configuration."""
    if _existing(path).stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: is larger than any adapter configuration")
    config = _json_object(path, path.read_bytes())

    def refuse(field: str, ask: str) -> None:
        value = str(config.get(field))[:80]
        raise CheckpointError(f"{path}: {field}: found {value}, expected {ask}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    rank, targets = config.get("r"), config.get("target_modules")
    if type(rank) is not int or rank < 1:
        refuse("r", "a rank of at least 1")
    alpha = config.get("lora_alpha")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        refuse("lora_alpha", "a finite number")
    if not isinstance(targets, list) or not targets or not all(type(t) is str for t in targets):
        refuse("target_modules", "a list of module names")
    for field, plain in _PLAIN.items():
        if config.get(field, plain) not in (plain, None):
            refuse(field, f"{plain}, as in plain LoRA")
    return rank, targets


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}): fetch or train it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object: fetch or train it again")
    return value


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing: fetch or train the checkpoint again")
    return path


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else "×".join(map(str, shape))
