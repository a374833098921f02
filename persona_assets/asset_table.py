"""The assets of a study as plain data: their partitions, what each is made from, and why.

One row an asset. Dagster's own ``code_version`` stales every partition of an asset at once; the
inputs here are exact: a partition's own slice of the study file, the source of the functions that
make that arm, and the data versions of exactly its upstream partitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from persona_assets import environment
from persona_assets.asset_row import Asset, Job
from persona_assets.code_sources import AUDITS, WORLD, code_sources
from persona_assets.environment import ARC_FILES, TOKENIZER_FILES
from persona_assets.hashing import module_hashes, sha256_file, sha256_source
from persona_assets.publish_table import PUBLISH_JOBS, publish_table
from persona_assets.rationales.arms import unscored
from persona_assets.rationales.methods import arm_sources, turn_sources
from persona_assets.stats.comparability import planned_facts
from persona_assets.stats.lexicon import lexicon_cells, undefined_because
from persona_assets.store import Ref
from persona_assets.study import Study
from persona_assets.study_schema import DriftCheck, LocalRegistry

JOBS: Mapping[str, Job] = {
    "inputs": Job(
        ("tokenizer", "question_bank", "base_model"),
        "What every cell stands on: tokenizer, questions, base model.",
    ),
    "rationales": Job(("rationales",), "The rationales of one condition."),
    "prior_checkpoints": Job(
        ("prior_checkpoint", "prior_accuracies"),
        "The prior study's cells: published to the local registry, and evaluated to averages.",
    ),
    "forced_rationales": Job(
        ("forced_rationales",), "The rationales that content-forcing scaffolds put in place."
    ),
    "baseline": Job(("baseline_outcomes",), "The untrained model on the whole evaluation grid."),
    "cell": Job(
        ("training_dataset", "checkpoint", "cell_outcomes", "cell_diagnostics"),
        "One cell from training rows to outcomes: dataset, checkpoint, evaluation, diagnostics.",
    ),
    "contrasts": Job(
        ("contrast_estimate",), "One registered contrast, once its cells have landed."
    ),
    "aggregates": Job(
        (
            *("multiplicity", "loss_matrix", "exploratory_estimates", "vocabulary_leakage"),
            *("number_ledger", "warehouse", "forest_plot", "loss_heatmap", "report"),
        ),
        "Everything that needs the whole grid: multiplicity, ledger, warehouse, figures, report.",
    ),
    **PUBLISH_JOBS,
}


def asset_table(study: Study) -> tuple[Asset, ...]:
    """The assets of a study, upstream ones first."""
    cells = tuple(cell.key for cell in study.cells)
    contrasts = tuple(contrast.key for contrast in study.contrast_list)
    carried = tuple(cell.key for cell in study.cells_of("carry_over"))
    is_carried = frozenset(carried).__contains__
    prior = bool(carried) and isinstance(study.carry_over, LocalRegistry)
    miniature = study.base_model.kind == "miniature"
    bank, tokenizer, base = Ref("question_bank"), Ref("tokenizer"), Ref("base_model")
    baseline = Ref("baseline_outcomes")
    world = study.questions.model_dump(mode="json")
    model = study.base_model.model_dump(mode="json")
    training_settings = {"threads": study.compute.threads}
    evaluation = study.evaluation.model_dump(mode="json")
    if study.evaluation.engine == "vllm_server":  # where the engine runs changes no answer
        evaluation["engine"] = "vllm"
    facts = planned_facts(study)

    def condition(key: str | None) -> Ref:
        return Ref("rationales", study.cell(key).condition)

    def writer_settings() -> dict[str, Any]:
        settings = study.rationales
        return settings.model_dump(mode="json", exclude=set(settings.transport))

    def arm_settings(source: str, arm_name: str) -> dict[str, Any]:
        return {
            "seed": study.seed,
            "writer": writer_settings(),
            "arm": asdict(study.arm(arm_name)),
            "source": source,
            "system_prompt": study.personas[source],
        }

    def condition_settings(key: str | None) -> dict[str, Any]:
        return arm_settings(*key.split("."))

    def dataset_settings(key: str | None) -> dict[str, Any]:
        cell = study.cell(key)
        return arm_settings(cell.source, cell.arm) | {
            "cell_seed": cell.seed,
            "reference_only": cell.origin == "carry_over",
        }

    def checkpoint_upstream(key: str | None) -> tuple[Ref, ...]:
        if study.cell(key).origin == "trained":
            return (base, Ref("training_dataset", key))
        return (base, Ref("prior_checkpoint", key)) if prior else (base,)

    def checkpoint_settings(key: str | None) -> dict[str, Any]:
        cell = study.cell(key)
        if cell.origin == "trained":
            recipe = study.training.model_dump(mode="json")
            return {"recipe": recipe, "seed": cell.seed} | training_settings
        beside = {"prior_training", "training", "drift", "drift_tolerance", "keep"}
        return study.carry_over.model_dump(mode="json", exclude=beside)

    def checkpoint_reader(key: str | None) -> Ref | None:
        keep = getattr(study.carry_over, "keep", "always") if is_carried(key) else "always"
        return Ref("cell_outcomes", key) if keep == "until_evaluated" else None

    def prior_settings(key: str | None) -> dict[str, Any]:
        recipe = study.carry_over.prior_training.model_dump(mode="json")
        return dataset_settings(key) | training_settings | {"recipe": recipe}

    def evaluation_settings(key: str | None) -> dict[str, Any]:
        return training_settings | {
            "personas": study.personas,
            "scaffolds": [asdict(study.scaffold(name)) for name in study.scaffolds],
            "evaluation": evaluation,
        }

    def forced_settings(key: str | None) -> dict[str, Any]:
        return {
            "seed": study.seed,
            "writer": writer_settings(),
            "arm": asdict(study.arm(key)),
            "personas": study.personas,
        }

    def forced_sources(key: str | None) -> dict[str, str]:
        arm = study.arm(key)
        return {k: v for p in study.personas for k, v in arm_sources(study, p, arm).items()}

    def gate_settings() -> dict[str, Any]:
        limit = study.evaluation.max_rationale_tokens
        return {"seed": study.seed, "max_rationale_tokens": limit} | training_settings

    def diagnostics_upstream(key: str | None) -> tuple[Ref, ...]:
        earlier = (Ref("prior_accuracies", key),) if prior and is_carried(key) else ()
        return (bank, baseline, Ref("cell_outcomes", key), *earlier)

    def diagnostics_settings(key: str | None) -> dict[str, Any]:
        registry = study.carry_over if is_carried(key) else None
        drift = (
            getattr(registry, "drift_tolerance", None)
            if prior
            else getattr(registry, "drift", None)
        )
        return {
            "dtype": study.evaluation.dtype,
            "drift": drift.model_dump(mode="json") if isinstance(drift, DriftCheck) else drift,
        }

    def contrast_upstream(key: str | None) -> tuple[Ref, ...]:
        feeding = study.contrast_cells(study.contrast(key))
        diagnosed = (Ref("cell_diagnostics", cell.key) for cell in feeding)
        return (bank, *(Ref("cell_outcomes", cell.key) for cell in feeding), baseline, *diagnosed)

    def contrast_settings(key: str | None) -> dict[str, Any]:
        contrast = study.contrast(key)
        registered = ("hypothesis", "a", "b", "axis")  # not what another experiment found
        return {
            "contrast": {name: getattr(contrast, name) for name in registered}
            | {"equivalence": [test.model_dump() for test in contrast.equivalence]},
            "inference": study.inference.model_dump(mode="json"),
            "personas": list(study.personas),
            "seed": study.seed,
            "compared": {cell.key: facts[cell.key] for cell in study.contrast_cells(contrast)},
        }

    def each(name: str, keys: tuple[str, ...]) -> tuple[Ref, ...]:
        return tuple(Ref(name, key) for key in keys)

    forced = each("forced_rationales", study.forced_arms)
    every_contrast = each("contrast_estimate", contrasts)
    every_outcome = (baseline, *each("cell_outcomes", cells), *each("cell_diagnostics", cells))

    speaking = undefined_because(study) is None
    landed = (
        bank,
        base,
        *each("rationales", study.conditions),
        *each("training_dataset", cells),
        *each("checkpoint", cells),
        *every_outcome,
        *every_contrast,
        *map(Ref, ("multiplicity", "loss_matrix", "exploratory_estimates")),
        *((Ref("vocabulary_leakage"),) if speaking else ()),
    )

    def fixed(*refs: Ref) -> Callable[[str | None], tuple[Ref, ...]]:
        return lambda key: refs

    table = [
        Asset(
            "tokenizer",
            "inputs",
            frozenset({"huggingface"}),
            "The base model's tokenizer and chat template. An asset of its own, so that training "
            "data depends on it and not on gigabytes of weights.",
            None,
            fixed(),
            lambda key: (
                world | {"seed": study.seed}
                if miniature
                else model | _local_files(environment.TOKENIZER_DIR, TOKENIZER_FILES)
            ),
            lambda key: (
                module_hashes("training.miniature_tokenizer", "questions.miniature")
                if miniature
                else {}
            ),
        ),
        Asset(
            "question_bank",
            "inputs",
            frozenset({"polars", "parquet"}),
            "Train and eval questions with normalised labels and identity hashes.",
            None,
            fixed(),
            lambda key: (
                world
                | (
                    {"seed": study.seed}
                    if miniature
                    else _local_files(environment.ARC_DIR, ARC_FILES)
                )
            ),
            lambda key: module_hashes(
                "questions.bank", *(WORLD if miniature else ("questions.arc",))
            ),
        ),
        Asset(
            "base_model",
            "inputs",
            frozenset({"pytorch", "safetensors"}),
            "The model that every adapter sits on: a snapshot at a pinned revision, or the "
            "miniature model, trained from the study's seed and gated.",
            None,
            fixed(tokenizer, bank) if miniature else fixed(),
            lambda key: model | (gate_settings() if miniature else {}),
            lambda key: (
                module_hashes(
                    "training.miniature", "training.miniature_corpus", "rationales.miniature"
                )
                if miniature
                else {}
            ),
        ),
        Asset(
            "rationales",
            "training_data",
            frozenset({"polars", "parquet"}),
            "The written or constructed rationales of one condition (source × arm), with the "
            "writer's accounting.",
            study.conditions,
            fixed(bank, tokenizer),
            condition_settings,
            lambda key: arm_sources(study, key.split(".")[0], study.arm(key.split(".")[1])),
        ),
        Asset(
            "training_dataset",
            "training_data",
            frozenset({"polars", "parquet"}),
            "One cell's training rows: text, token ids, loss mask, target letter. For carried-over "
            "cells a reference, not what the checkpoint saw.",
            cells,
            lambda key: (bank, tokenizer, condition(key)),
            dataset_settings,
            lambda key: _row_sources() | module_hashes(*AUDITS),
        ),
    ]
    if prior:
        table.append(
            Asset(
                "prior_checkpoint",
                "checkpoints",
                frozenset({"pytorch", "safetensors"}),
                "The prior study's cell: trained with its own recipe, published to the local "
                "registry that carry-over cells are fetched from.",
                carried,
                lambda key: (base, tokenizer, bank, condition(key)),
                prior_settings,
                lambda key: _row_sources(),
                code_version="2",
            )
        )
    if study.forced_arms:
        table.append(
            Asset(
                "forced_rationales",
                "evaluation",
                frozenset({"polars", "parquet"}),
                "The rationales that content-forcing scaffolds put in place of generated ones: of "
                "one arm's kind, for every persona and eval question.",
                study.forced_arms,
                fixed(bank, tokenizer),
                forced_settings,
                forced_sources,
            )
        )
    if prior:
        table.append(
            Asset(
                "prior_accuracies",
                "evaluation",
                frozenset({"polars", "parquet"}),
                "What the prior study kept of a cell: its accuracies, averaged over the questions.",
                carried,
                lambda key: (base, tokenizer, bank, *forced, Ref("prior_checkpoint", key)),
                evaluation_settings,
            )
        )
    table += [
        Asset(
            "checkpoint",
            "checkpoints",
            frozenset({"pytorch", "safetensors"}),
            "One cell's LoRA adapter: trained here, or fetched at a pinned revision and verified "
            "by hash, as the cell's origin says.",
            cells,
            checkpoint_upstream,
            checkpoint_settings,
            code_version="2",
            released_after=checkpoint_reader,
        ),
        Asset(
            "baseline_outcomes",
            "evaluation",
            frozenset({"pytorch", "parquet"}),
            "The untrained model on every persona × scaffold × question.",
            None,
            fixed(base, tokenizer, bank, *forced),
            evaluation_settings,
        ),
        Asset(
            "cell_outcomes",
            "evaluation",
            frozenset({"pytorch", "parquet"}),
            "One cell on every persona × scaffold × question, one row each.",
            cells,
            lambda key: (base, tokenizer, bank, *forced, Ref("checkpoint", key)),
            lambda key: evaluation_settings(key) | {"origin": study.cell(key).origin},
        ),
        Asset(
            "cell_diagnostics",
            "evaluation",
            frozenset({"polars", "parquet"}),
            "One cell's answers beside the untrained model's, and beside the earlier experiment's: "
            "whether the checkpoint acts, whether letters collapse, whether results drift.",
            cells,
            diagnostics_upstream,
            diagnostics_settings,
            sources=lambda key: code_sources("cell_diagnostics"),
        ),
        Asset(
            "contrast_estimate",
            "analysis",
            frozenset({"numpy", "parquet"}),
            "One registered macro contrast with its per-source rows, from exactly the cells that "
            "feed it.",
            contrasts,
            contrast_upstream,
            contrast_settings,
            sources=lambda key: code_sources("contrast_estimate"),
        ),
        Asset(
            "multiplicity",
            "analysis",
            frozenset({"numpy", "parquet"}),
            "Holm over the family of macro contrasts, and the equivalence tests.",
            None,
            fixed(*every_contrast),
            lambda key: (
                study.inference.model_dump(mode="json")
                | {"contrasts": [contrast_settings(contrast)["contrast"] for contrast in contrasts]}
            ),
            sources=lambda key: code_sources("multiplicity"),
        ),
        Asset(
            "loss_matrix",
            "analysis",
            frozenset({"polars", "parquet"}),
            "Mean loss of every arm under every scaffold, on both axes.",
            None,
            fixed(bank, *every_outcome),
            lambda key: {"personas": list(study.personas), "cells": cells},
            sources=lambda key: code_sources("loss_matrix"),
        ),
        Asset(
            "exploratory_estimates",
            "analysis",
            frozenset({"numpy", "parquet"}),
            "Estimates that are not registered: each arm under its own training scaffold, under "
            "the others, and further pairs of arms.",
            None,
            fixed(bank, *every_outcome),
            lambda key: {
                "contrasts": [contrast_settings(contrast)["contrast"] for contrast in contrasts],
                "arms": {arm: study.arm(arm).scaffold.name for arm in study.arms},
                "scaffolds": list(study.scaffolds),
                "cells": cells,
                "personas": list(study.personas),
                "inference": study.inference.model_dump(mode="json"),
                "seed": study.seed,
            },
            sources=lambda key: code_sources("exploratory_estimates"),
        ),
        *(
            [
                Asset(
                    "vocabulary_leakage",
                    "analysis",
                    frozenset({"polars", "parquet"}),
                    "How much more of a source's own words a trained model says under other "
                    "personas than the untrained one does.",
                    None,
                    fixed(
                        bank,
                        *each("training_dataset", tuple(cell.key for cell in lexicon_cells(study))),
                        *every_outcome,
                    ),
                    lambda key: {
                        "contrasts": [
                            contrast_settings(contrast)["contrast"] for contrast in contrasts
                        ],
                        "personas": study.personas,
                        "scaffolds": [asdict(study.scaffold(name)) for name in study.scaffolds],
                        "cells": cells,
                        "seed": study.seed,
                        "confidence": study.inference.confidence,
                    },
                    sources=lambda key: code_sources("vocabulary_leakage"),
                )
            ]
            if speaking
            else []
        ),
        Asset(
            "number_ledger",
            "report",
            frozenset({"duckdb", "parquet"}),
            "Every number that the report prints, with its interval, its cells, and the SQL and "
            "the estimator that recompute it.",
            None,
            fixed(*landed),
            lambda key: study.content,
            sources=lambda key: code_sources("number_ledger"),
            quotes_checks=True,
        ),
        Asset(
            "warehouse",
            "report",
            frozenset({"duckdb"}),
            "The study's DuckDB database: every outcome, question, training row and estimate, and "
            "the ledger of its numbers.",
            None,
            fixed(*landed, Ref("number_ledger")),
            lambda key: study.content,
            sources=lambda key: code_sources("warehouse"),
        ),
        Asset(
            "forest_plot",
            "report",
            frozenset({"matplotlib"}),
            "The registered contrasts with both schemes' intervals and per-source estimates.",
            None,
            fixed(Ref("multiplicity")),
            lambda key: {"contrasts": [contrast_settings(c)["contrast"] for c in contrasts]},
            sources=lambda key: code_sources("forest_plot"),
        ),
        Asset(
            "loss_heatmap",
            "report",
            frozenset({"matplotlib"}),
            "The loss matrix as a heatmap.",
            None,
            fixed(Ref("loss_matrix")),
            sources=lambda key: code_sources("loss_heatmap"),
        ),
        Asset(
            "report",
            "report",
            frozenset({"html", "markdown"}),
            "The study's report, rendered from the warehouse and the study file.",
            None,
            fixed(Ref("warehouse"), Ref("forest_plot"), Ref("loss_heatmap")),
            lambda key: study.content,
            sources=lambda key: code_sources("report"),
        ),
    ]
    return (*table, *publish_table(study, table))


def _row_sources() -> dict[str, str]:
    """What turns rationales into training rows and their loss mask."""
    mask = {unscored.__qualname__: sha256_source(unscored)}
    return module_hashes("training.dataset", "questions.bank") | turn_sources() | mask


def _local_files(variable: str, patterns: tuple[str, ...]) -> dict[str, Any]:
    """Hashes of the files that stand in for the hub's, where a folder is named for them."""
    folder = environment.local_folder(variable)
    if folder is None:
        return {}
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {variable: {path.name: sha256_file(path) for path in paths}}
