"""What a checkpoint's files say of themselves, read without loading (or unpickling) anything."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: Largest header or configuration read, in bytes; an adapter of a 7B model needs about 0.1 MB.
_MAX_JSON = 10_000_000


class CheckpointError(ValueError):
    """A checkpoint folder that must not be loaded; names file, tensor or field, and remedy."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a safetensors file: its dtype, its shape, and where its bytes stand."""

    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]


def read_header(path: Path) -> dict[str, Tensor]:
    """Names, dtypes and shapes of a safetensors file, from its header alone.

    Raises:
        CheckpointError: it is no such file, or its size is not what the header says.
    """
    size = existing(path).stat().st_size
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


def read_model_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a whole model, in one file or in the several that its index names.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return read_header(single)
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(_is_plain_name(name) for name in placed.values()):
        raise CheckpointError(f"{index}: weight_map: expected tensors and their files' names")
    found: dict[str, Tensor] = {}
    for name in sorted(set(placed.values())):
        tensors = read_header(folder / name)
        if tensors.keys() != {tensor for tensor, file in placed.items() if file == name}:
            raise CheckpointError(
                f"{index}: {name} holds other tensors than it says: fetch the checkpoint again"
            )
        found |= tensors
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CheckpointError: the file is missing, larger than any configuration, or holds none.
    """
    if existing(path).stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: is larger than any configuration: fetch it again")
    return _json_object(path, path.read_bytes())


def existing(path: Path) -> Path:
    """``path``, which is a file.

    Raises:
        CheckpointError: it is not.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: is missing: fetch or train the checkpoint again")
    return path


def refuse_pickles(folder: Path) -> None:
    """See that nothing in a checkpoint's folder unpickles when it is loaded.

    Raises:
        CheckpointError: names the first such file.
    """
    for path in sorted(folder.glob("*")):
        if path.suffix in _PICKLES:
            raise CheckpointError(
                f"{path}: pickled weights are never loaded: save the checkpoint as safetensors"
            )


def refuse_other_tensors(
    where: Path, expected: dict[str, tuple[int, ...]], found: dict[str, Tensor]
) -> None:
    """See that the tensors ``found`` have exactly the ``expected`` names and shapes.

    Raises:
        CheckpointError: names the first that is missing, unexpected, or of another shape.
    """
    for name in sorted(expected.keys() | found.keys()):
        here = found[name].shape if name in found else None
        if here != expected.get(name):
            raise CheckpointError(
                f"{where}: tensor {name}: expected {_shape(expected.get(name))}, found "
                f"{_shape(here)}: use a checkpoint of this base model"
            )


def _tensor(path: Path, name: str, entry: Any) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(a), int(b)]} if (
            dtype in _DTYPE_BYTES and all(type(n) is int and n >= 0 for n in shape)
        ):
            return Tensor(dtype, tuple(shape), (a, b))
    raise CheckpointError(
        f"{path}: tensor {name}: is not a {', '.join(_DTYPE_BYTES)} tensor: {str(entry)[:80]}"
    )


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}): fetch or train it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object: fetch or train it again")
    return value


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else "×".join(map(str, shape))
