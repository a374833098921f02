"""Checkpoints on disk: what a folder must hold, and lending an adapter to the resident base model.

A checkpoint from elsewhere is looked at before it is loaded: names, shapes and sizes come from
the safetensors headers, nothing that unpickles is ever opened, and of an adapter's configuration
only the few options that plain LoRA needs are used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from persona_assets.audit import Audit, audit
from persona_assets.hashing import sha256_file, sha256_lines
from persona_assets.training.headers import (
    CheckpointError,
    existing,
    read_header,
    read_json,
    read_model_headers,
    refuse_other_tensors,
    refuse_pickles,
)
from persona_assets.training.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from persona_assets.training.resident import borrowed, linear_shapes, named_by

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Format = Literal["adapter", "merged"]

#: The two files of an adapter, and all that its hash covers.
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
MODEL_CONFIG = "config.json"
#: Options of a model that ask for code of its own to be run.
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")
#: No adapter is near these; what is beyond them is not worked with.
_HIGHEST_RANK, _LARGEST_ALPHA, _MOST_TARGETS = 2**16, 1e9, 10_000
#: A whole number larger than this is a model's option only if it is the base's.
_LARGE = 2**20
#: Options of an adapter that are used.
_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules"}
#: Options that say where it comes from or how it was trained, and change nothing in use.
_INCIDENTAL = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "task_type",
}
#: Options of a model that change nothing in its forward pass.
_NOT_GEOMETRY = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True, slots=True)
class _Lora:
    """Plain LoRA (Hu et al. 2021): W + scaling · B A in the modules that ``targets`` name."""

    rank: int
    scaling: float
    targets: list[str]


def is_adapter(folder: Path) -> bool:
    """Whether a checkpoint folder holds a LoRA adapter (rather than a whole model)."""
    return (folder / ADAPTER_CONFIG).is_file()


def adapter_hash(folder: Path) -> str:
    """SHA-256 over the adapter's two files: the name an adapter goes by.

    Raises:
        CheckpointError: one of them is missing.
    """
    return sha256_lines(f"{name} {sha256_file(existing(folder / name))}" for name in ADAPTER_FILES)


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


def adapter_rank(folder: Path) -> int:
    """The rank of an adapter.

    Raises:
        CheckpointError: its configuration is not plain LoRA.
    """
    return _read_lora(folder / ADAPTER_CONFIG).rank


@contextmanager
def beside(base_model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """The resident base model with the adapter of ``folder`` applied beside its weights.

    Afterwards, also if the body raises, the base is what it was.

    Raises:
        CheckpointError: the adapter does not fit the base.
    """
    from peft import PeftModel

    check_adapter(folder, linear_shapes(base_model))
    with borrowed(base_model):
        yield PeftModel.from_pretrained(base_model, folder).get_base_model()


@contextmanager
def adapted(base_model: PreTrainedModel, folder: Path) -> Iterator[PreTrainedModel]:
    """The resident base model with the adapter of ``folder`` merged into its weights.

    Afterwards, also if the body raises, the base is bit-identical to what it was. The update is
    computed in float32 and the sum rounded once to the model's dtype.

    Raises:
        CheckpointError: the adapter does not fit the base, or holds a value that is not finite.
    """
    updates = read_updates(folder, linear_shapes(base_model), str(base_model.device))
    with borrowed(base_model, changing=updates.keys()):
        for target, update in updates.items():
            weight = base_model.get_submodule(target).weight.data
            weight.copy_(update.added_to(weight))
        yield base_model


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter adds to one module's weight: scaling · B A.

    Attributes:
        a: [rank, in features].
        b: [out features, rank].
        scaling: The factor.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The sum, [out, in], computed in float32 and rounded once to the weight's dtype."""
        return (weight.float() + self.b.float() @ self.a.float() * self.scaling).to(weight.dtype)


def read_updates(
    folder: Path, shapes: Mapping[str, tuple[int, int]], device: str = "cpu"
) -> dict[str, Update]:
    """What an adapter adds to the base model, by the full name of the module.

    Args:
        folder: The adapter's folder.
        shapes: (out, in) features of the base model's linear modules, by full name.
        device: Where the tensors are put.

    Raises:
        CheckpointError: as :func:`check_adapter`, or a value is not finite.
    """
    import torch
    from safetensors.torch import load_file

    targets = check_adapter(folder, shapes)
    scaling = _read_lora(folder / ADAPTER_CONFIG).scaling
    tensors = load_file(folder / ADAPTER_WEIGHTS, device=device)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: tensor {name} is not finite: train the cell again"
            )
    pairs = {target: _tensor_names(target) for target in targets}
    return {target: Update(tensors[a], tensors[b], scaling) for target, (a, b) in pairs.items()}


def fits_base(folder: Path, base_folder: Path, expected_format: Format | None = None) -> Audit:
    """``checkpoint_fits_base``: a checkpoint's files against those of the base model.

    Args:
        folder: An adapter's folder or a whole model's.
        base_folder: The base model's.
        expected_format: Which of the two it must be; None for either.
    """
    ok = True
    try:
        found = check_checkpoint(folder, base_folder, expected_format)
    except CheckpointError as error:
        ok, found = False, str(error)
    return audit(
        "checkpoint_fits_base",
        ok,
        observed=found,
        threshold="in safetensors, either a plain LoRA adapter of the base's own modules or a "
        "whole model of the base's configuration, tensors and shapes",
        remedy="Fetch or train the checkpoint again, for this base model.",
    )


def check_checkpoint(folder: Path, base_folder: Path, expected_format: Format | None = None) -> str:
    """Look at a checkpoint of either format without loading it; what was found, in words.

    Raises:
        CheckpointError: it is not of the expected format, or as :func:`check_adapter` and
            :func:`check_model`.
    """
    found_format: Format = "adapter" if is_adapter(folder) else "merged"
    if expected_format not in (found_format, None):
        raise CheckpointError(
            f"{folder}: expected a checkpoint of format {expected_format}, found {found_format}"
        )
    if found_format == "adapter":
        n = len(check_adapter(folder, matrix_shapes(base_folder)))
        return f"{n} modules adapted, each of the base's shape"
    n = check_model(folder, base_folder)
    return f"a whole model of {n} tensors, each of the base's shape"


def check_adapter(folder: Path, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Look at an adapter without loading it; the names of the modules it adapts.

    Args:
        folder: The adapter's folder.
        shapes: (out, in) features of the base model's linear modules, by full name.

    Raises:
        CheckpointError: a file is missing, pickled or damaged; an option is not plain LoRA; or
            a tensor is missing, unexpected, or of another shape.
    """
    refuse_pickles(folder)
    lora = _read_lora(folder / ADAPTER_CONFIG)
    targets = [name for name in shapes if named_by(name, lora.targets)]
    expected: dict[str, tuple[int, ...]] = {}
    for target in targets:
        out_features, in_features = shapes[target]
        a, b = _tensor_names(target)
        expected |= {a: (lora.rank, in_features), b: (out_features, lora.rank)}
    path = folder / ADAPTER_WEIGHTS
    refuse_other_tensors(path, expected, read_header(path))
    return targets


def check_model(folder: Path, base_folder: Path) -> int:
    """Look at a whole model without loading it; the number of its tensors.

    Raises:
        CheckpointError: a file is missing, pickled or damaged; an option that shapes the forward
            pass differs from the base's; or a tensor is missing, unexpected, or of another shape.
    """
    refuse_pickles(folder)
    _refuse_hostile(folder, base_folder)
    config, base = _geometry(folder), _geometry(base_folder)
    for field in sorted(config.keys() | base.keys()):
        if config.get(field) != base.get(field):
            raise CheckpointError(
                f"{folder / MODEL_CONFIG}: {field}: found {config.get(field)}, expected "
                f"{base.get(field)}, as in the base model"
            )
    found, expected = read_model_headers(folder), read_model_headers(base_folder)
    if base.get("tie_word_embeddings"):  # the head is the embeddings, saved once or twice
        for tensors in (found, expected):
            tensors.pop("lm_head.weight", None)
    refuse_other_tensors(folder, {name: t.shape for name, t in expected.items()}, found)
    return len(found)


def matrix_shapes(base_folder: Path) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every matrix among a model's weights, by its module's full name."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in read_model_headers(base_folder).items()
        if name.endswith(".weight") and len(tensor.shape) == 2
    }


def _refuse_hostile(folder: Path, base_folder: Path) -> None:
    """See that a configuration can be handed to transformers, which makes lists as long as it says.

    Raises:
        CheckpointError: it asks for code to be run, is of another kind of model, or holds a huge
            number that the base has not.
    """
    path = folder / MODEL_CONFIG
    stated, base = read_json(path), read_json(base_folder / MODEL_CONFIG)
    for field in _CODE:
        if stated.get(field):
            raise CheckpointError(
                f"{path}: {field}: found {str(stated[field])[:80]}, which asks for code to be run: "
                "use a checkpoint of an architecture that transformers has"
            )
    kind = stated.get("model_type")
    if kind != base.get("model_type"):
        raise CheckpointError(
            f"{path}: model_type: found {str(kind)[:80]}, expected {base.get('model_type')}, as in "
            "the base model"
        )
    for field, value in stated.items():
        if base.get(field) != value and (large := _largest(value)) > _LARGE:
            raise CheckpointError(
                f"{path}: {field[:80]}: found {str(large)[:20]}, expected "
                f"{str(base.get(field, 'none'))[:80]}, as in the base model"
            )


def _largest(value: Any) -> int:
    """The largest whole number in a JSON value, by size; 0 if there is none."""
    if isinstance(value, dict | list):
        below = value.values() if isinstance(value, dict) else value
        return max(map(_largest, below), default=0)
    return abs(value) if type(value) is int else 0


def _geometry(folder: Path) -> dict[str, Any]:
    """A model's options with their defaults filled in, but for those in ``_NOT_GEOMETRY``."""
    from transformers import AutoConfig

    path = folder / MODEL_CONFIG
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    except Exception as error:  # each option of a foreign file has its own ways to be wrong
        raise CheckpointError(
            f"{path}: is no model's configuration ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return {field: value for field, value in config.items() if field not in _NOT_GEOMETRY}


def _read_lora(path: Path) -> _Lora:
    """A plain LoRA configuration; every option of PEFT that is not used must have its default.

    A list of what is allowed, since PEFT adds with each version options that change what the
    tensors mean, rewrite the base's weights, or name code to import.
    """
    from peft import LoraConfig

    config = read_json(path)

    def refuse(field: str, ask: str) -> None:
        value = str(config.get(field))[:80]
        raise CheckpointError(
            f"{path}: {field}: found {value}, expected {ask}: save the checkpoint as a plain LoRA "
            "adapter or as a whole merged model"
        )

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "LORA")
    rank, alpha, targets = (config.get(f) for f in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or not 1 <= rank <= _HIGHEST_RANK:
        refuse("r", f"a rank of 1 to {_HIGHEST_RANK}")
    if type(alpha) not in (int, float) or not 0 < alpha < _LARGEST_ALPHA:
        refuse("lora_alpha", f"a number above 0 and below {_LARGEST_ALPHA:g}")
    if (
        not isinstance(targets, list)
        or not 1 <= len(targets) <= _MOST_TARGETS
        or not all(type(t) is str for t in targets)
    ):
        refuse("target_modules", f"a list of 1 to {_MOST_TARGETS} module names")
    rslora = config.get("use_rslora", False)
    if type(rslora) is not bool:
        refuse("use_rslora", "true or false")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        refuse("task_type", "CAUSAL_LM")
    defaults = LoraConfig().to_dict()
    for field in sorted(config.keys() - _USED - _INCIDENTAL):
        default = defaults.get(field)
        if config[field] not in (default, None):
            refuse(field, f"{default}, as in plain LoRA")
    return _Lora(rank, alpha / (math.sqrt(rank) if rslora else rank), targets)


def _tensor_names(target: str) -> tuple[str, str]:
    """PEFT's names of a module's A [rank, in] and B [out, rank]."""
    stem = f"base_model.model.{target}.lora_"
    return f"{stem}A.weight", f"{stem}B.weight"
