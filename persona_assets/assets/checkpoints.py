"""Group ``checkpoints``: adapters trained here, and those carried over from an earlier study."""

from __future__ import annotations

import math
from collections.abc import Sequence

import polars as pl

from persona_assets import environment
from persona_assets.assets.base import Made, Task
from persona_assets.assets.evaluation import resident_base
from persona_assets.assets.metadata import inline_plot
from persona_assets.assets.plots import sparkline
from persona_assets.audit import Audit, audit
from persona_assets.questions.bank import from_frame
from persona_assets.residency import device, resident_tokenizer
from persona_assets.store import write_atomically
from persona_assets.study_schema import HubRegistry, TrainingRecipe
from persona_assets.training.checkpoints import adapter_hash, fits_base
from persona_assets.training.dataset import build_dataset
from persona_assets.training.registry import FolderRegistry, HubFolders, RegistryError


def checkpoint(task: Task) -> Made:
    """One cell's checkpoint, by the cell's origin."""
    return _trained(task) if task.cell.origin == "trained" else _carried_over(task)


def prior_checkpoint(task: Task) -> Made:
    """The prior study's cell: trained by its own recipe, published to the local registry."""
    cell, questions = task.cell, from_frame(task.frame("question_bank"))
    rows = build_dataset(
        task.study,
        cell,
        questions,
        task.frame("rationales", cell.condition),
        resident_tokenizer(task.directory("tokenizer")),
    )
    losses = _train(task, rows, task.study.recipe(cell))
    sha256 = _local_registry(task).publish(cell.key, task.draft)
    return Made(
        audits=[_loss_fell(losses)],
        summary={"registry_sha256": sha256, "steps": len(losses)},
        metadata=_curve(losses),
        data_version=sha256,
    )


def _trained(task: Task) -> Made:
    rows = task.frame("training_dataset", task.key)
    losses = _train(task, rows, task.study.training)
    sha256 = adapter_hash(task.draft)
    return Made(
        audits=[_loss_fell(losses), fits_base(task.draft, task.directory("base_model"))],
        summary=_checkpoint_summary(task, "trained here", sha256)
        | {"steps": len(losses), "device": device(task.study.wants_gpu)},
        metadata=_curve(losses),
        data_version=sha256,
    )


def _carried_over(task: Task) -> Made:
    """The earlier experiment's checkpoint, from wherever the study says it is kept."""
    settings, base = task.study.carry_over, task.directory("base_model")
    if isinstance(settings, HubRegistry):
        sha256 = HubFolders(settings).fetch(task.key, task.draft, base)
        form, source = settings.format, f"{settings.repo} at {settings.revision}"
    else:
        pinned = task.manifest("prior_checkpoint", task.key).data_version
        registry = _local_registry(task)
        try:
            sha256 = registry.fetch(task.key, task.draft, expected=pinned)
        except RegistryError:  # lost or damaged since; the store has what was published
            registry.publish(task.key, task.directory("prior_checkpoint", task.key))
            sha256 = registry.fetch(task.key, task.draft, expected=pinned)
        form, source = "adapter", f"local registry, {pinned}"
    return Made(
        audits=[fits_base(task.draft, base, form)],
        summary=_checkpoint_summary(task, source, sha256),
        data_version=sha256,
    )


def _local_registry(task: Task) -> FolderRegistry:
    """The folder that the study's prior checkpoints are published to."""
    return FolderRegistry(environment.data_dir() / "registry" / task.study.name)


def _train(task: Task, rows: pl.DataFrame, recipe: TrainingRecipe) -> Sequence[float]:
    """Train an adapter into the draft, with its log beside it; returns the loss of each step."""
    from persona_assets.training.lora import train_adapter

    log = train_adapter(
        resident_base(task, recipe.dtype),
        rows,
        recipe,
        task.cell.seed,
        task.draft,
        base_id=_base_id(task),
    )
    write_atomically(task.draft / "training_log.json", log.to_json())
    return log.losses


def _base_id(task: Task) -> str:
    """The base as adapters name it: the hub's name, or the miniature model's content hash."""
    base = task.study.base_model
    if base.kind == "hub":
        return base.repo
    return f"miniature-{task.manifest('base_model').data_version[:16]}"


def _checkpoint_summary(task: Task, source: str, sha256: str) -> dict[str, str]:
    return {"origin": task.cell.origin, "source": source, "checkpoint_sha256": sha256}


def _loss_fell(losses: Sequence[float]) -> Audit:
    tenth = max(1, len(losses) // 10)
    first, last = (math.fsum(part) / tenth for part in (losses[:tenth], losses[-tenth:]))
    return audit(
        "training_loss_fell",
        math.isfinite(last) and last < first,
        observed=f"mean loss {first:.4f} over the first {tenth} steps, {last:.4f} over the last",
        threshold="finite, and lower at the end",
        remedy="Look at the loss curve; lower the learning rate.",
    )


def _curve(losses: Sequence[float]) -> dict:
    from persona_assets.reporting.figures import loss_curve

    return {"loss": sparkline(losses), "loss_curve": inline_plot(loss_curve(losses))}
