"""The code that assets are made by: which modules and templates, by name, and their hashes.

Only what is cheap to make again, or decides a verdict, is here: evaluations cost GPU-hours, and
their machinery is covered by their ``code_version``, raised when it gives other results.
"""

from __future__ import annotations

from pathlib import Path

from persona_assets.hashing import module_hashes, sha256_file

#: What a dataset's checks are made by: other thresholds ask for another verdict.
AUDITS = tuple(
    f"training.{name}"
    for name in (
        *("audits", "audited", "audit_budget", "audit_prescription"),
        *("audit_rows", "audit_text"),
    )
)
WORLD = ("questions.miniature", "rationales.miniature")

_ESTIMATES = tuple(
    f"stats.{name}" for name in ("bootstrap", "contrasts", "estimands", "estimates", "losses")
)
_VOCABULARY = ("stats.bootstrap", "stats.lexicon", "stats.losses", "stats.vocabulary")
_FIGURES = ("reporting.figures", "reporting.style")
_WAREHOUSE = ("reporting.warehouse", "reporting.views", "reporting.comments")
_WANDB = ("publishing.wandb_records", "publishing.wandb_child")
_TEMPLATES = Path(__file__).parent / "reporting" / "templates"

_MODULES: dict[str, tuple[str, ...]] = {
    "cell_diagnostics": ("evaluation.diagnostics", "evaluation.drift"),
    "contrast_estimate": (*_ESTIMATES, "stats.comparability"),
    "multiplicity": (*_ESTIMATES, "stats.multiplicity", "stats.equivalence"),
    "loss_matrix": ("stats.contrasts", "stats.losses"),
    "exploratory_estimates": _ESTIMATES,
    "vocabulary_leakage": _VOCABULARY,
    "number_ledger": (
        *_WAREHOUSE,
        *(
            f"reporting.{name}"
            for name in ("ledger", "numbers", "diagnostic_numbers", "vocabulary_sql", "trace")
        ),
    ),
    "warehouse": _WAREHOUSE,
    "forest_plot": _FIGURES,
    "loss_heatmap": _FIGURES,
    "report": tuple(
        f"reporting.{name}"
        for name in (
            *("report", "conclusions", "threats", "prose", "printed", "words", "markdown"),
            *("policy", "queries", "lint", "style", "vocabulary_figure"),
        )
    ),
    "wandb_run": (*_WANDB, "stats.losses"),
    "wandb_bundle": _WANDB,
    "hub_upload": ("publishing.hub_content", "publishing.hub_card", "reporting.markdown"),
}


def code_sources(asset: str) -> dict[str, str]:
    """Hash of each module, and of each template of the report, that an asset is made by."""
    hashes = module_hashes(*_MODULES[asset])
    if asset == "report":
        hashes |= {path.name: sha256_file(path) for path in sorted(_TEMPLATES.glob("report.*"))}
    return hashes
