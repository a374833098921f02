"""What a checkpoint's files say of themselves, read without loading (or unpickling) anything."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
#: Largest header or configuration read, in bytes; an adapter of a 7B model needs about 0.1 MB.
MAX_JSON = 10_000_000
#: Dimensions of a tensor, and its extent along each, at the most: a product of them stays small.
_MOST_DIMENSIONS, _LONGEST = 8, 2**40
#: A whole model's weights: one file, or several with an index that says what is where.
MODEL_WEIGHTS, MODEL_INDEX = "model.safetensors", "model.safetensors.index.json"


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
        if length > min(size - 8, MAX_JSON):
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


def header_bytes(start: bytes) -> int:
    """How many bytes of a safetensors file :func:`read_header` reads, by its first 8."""
    (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\xff"))
    return 8 + length if length <= MAX_JSON else 8


def read_model_headers(folder: Path) -> dict[str, Tensor]:
    """The tensors of a whole model, in one file or in the several that its index names.

    Raises:
        CheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    single, index = folder / MODEL_WEIGHTS, folder / MODEL_INDEX
    if single.is_file() or not index.is_file():
        return read_header(single)
    found: dict[str, Tensor] = {}
    for name, placed in sorted(read_index(index).items()):
        tensors = read_header(folder / name)
        if tensors.keys() != placed:
            raise CheckpointError(
                f"{index}: {name} holds other tensors than it says: fetch the checkpoint again"
            )
        found |= tensors
    return found


def read_index(path: Path) -> dict[str, set[str]]:
    """The files of a model's weights, and the tensors that each must hold.

    Raises:
        CheckpointError: it is no such index, or names a file that lies elsewhere.
    """
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not all(_is_plain_name(name) for name in placed.values()):
        raise CheckpointError(f"{path}: weight_map: expected tensors and their files' names")
    files: dict[str, set[str]] = {}
    for tensor, name in placed.items():
        files.setdefault(name, set()).add(tensor)
    return files


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        CheckpointError: the file is missing, larger than any configuration, or holds none.
    """
    if existing(path).stat().st_size > MAX_JSON:
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
    for name in pickles(path.name for path in folder.glob("*")):
        raise CheckpointError(
            f"{folder / name}: pickled weights are never loaded: save the checkpoint as safetensors"
        )


def pickles(names: Iterable[str]) -> list[str]:
    """Those of some files that unpickle when they are loaded, sorted."""
    return sorted(name for name in names if PurePath(name).suffix in _PICKLES)


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
            dtype in _DTYPE_BYTES
            and len(shape) <= _MOST_DIMENSIONS
            and all(type(n) is int and 0 <= n <= _LONGEST for n in shape)
        ):
            return Tensor(dtype, tuple(shape), (a, b))
    raise CheckpointError(
        f"{path}: tensor {name}: is not a {', '.join(_DTYPE_BYTES)} tensor: {str(entry)[:80]}"
    )


def _json_object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        # UTF-8 alone, and a name once: the libraries that load the file read it so
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}): fetch or train it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object: fetch or train it again")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads``.

    Raises:
        ValueError: a key occurs twice in it.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return mapping


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else "×".join(map(str, shape))
