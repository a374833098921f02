"""The schema of a study file: what each section may say, and nothing about how they agree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    StringConstraints,
)
from pydantic_core import PydanticCustomError

#: What a path, a partition key and a contrast name can all bear: ``.`` joins the parts of a cell's
#: key, ``-`` the two arms of a contrast.
KEY = r"^[a-z][a-z0-9_]{0,62}$"
Key = Annotated[str, StringConstraints(pattern=KEY)]
#: Variables that a study file may have sent to its endpoint: those that were set for that. Study
#: files are shared, and one that could name any variable would send any secret to any host.
CHAT_KEY = r"^([A-Z][A-Z0-9]*_)*CHAT_API_KEY$"
Revision = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
Origin = Literal["trained", "carry_over"]
Axis = Literal["source_loss", "bystander_leakage"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _http_url(text: str) -> str:
    """``text`` itself, if it is an absolute http or https URL without a password."""
    url = HttpUrl(text)
    if url.username or url.password:  # it would be in the warehouse, and on the hub
        raise PydanticCustomError("password_in_url", "has a user name or password in it")
    return text


class MiniatureModel(_Section):
    """A small Qwen2-architecture model, trained here from the study's seed."""

    kind: Literal["miniature"]
    max_attempts: Annotated[int, Field(ge=1, le=3)] = 3


class HubModel(_Section):
    """A published chat model at a pinned commit."""

    kind: Literal["hub"]
    repo: str
    revision: Revision


class MiniatureQuestions(_Section):
    """Questions about an invented world, generated from the study's seed."""

    kind: Literal["miniature"]
    n_entities: Annotated[int, Field(ge=8, le=200)] = 60
    n_eval: Annotated[int, Field(ge=8)] = 96


class ArcQuestions(_Section):
    """ARC-Challenge as published: its train split for rows, its test split for outcomes."""

    kind: Literal["arc_challenge"]
    repo: str
    revision: Revision


class OfflineRationales(_Section):
    """Deterministic rationale writers: for the miniature world, or for any question."""

    writer: Literal["miniature", "template"]

    @property
    def transport(self) -> frozenset[str]:
        """The fields that a text does not depend on: none."""
        return frozenset()


class ChatApiRationales(_Section):
    """Rationales written by a chat model behind an OpenAI-compatible endpoint, at temperature 0.

    ``api_key_env`` names the environment variable that holds the key: ``CHAT_API_KEY``, or one that
    ends in ``_CHAT_API_KEY`` (null: the endpoint asks for none). No request is sent that could
    bring what the study has spent over ``budget_usd``, in which a request whose reply never came
    counts at the most that it can have cost. ``timeout_seconds`` is for a whole request, from
    connecting to the last byte; one that takes longer is not sent again, and ends the run: set it
    well above the slowest reply.
    """

    writer: Literal["chat_api"]
    base_url: Annotated[str, AfterValidator(_http_url)]
    model: Annotated[str, StringConstraints(min_length=1)]
    api_key_env: Annotated[str, StringConstraints(pattern=CHAT_KEY)] | None = "CHAT_API_KEY"
    max_tokens: Annotated[int, Field(ge=16)] = 320
    budget_usd: Annotated[float, Field(ge=0)]
    usd_per_million_input_tokens: Annotated[float, Field(ge=0)]
    usd_per_million_output_tokens: Annotated[float, Field(ge=0)]
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_seconds: Annotated[float, Field(gt=0)] = 60.0
    max_attempts: Annotated[int, Field(ge=1)] = 6

    @property
    def transport(self) -> frozenset[str]:
        """The fields that a reply does not depend on: changing them stales nothing."""
        return frozenset(type(self).model_fields) - {"writer", "base_url", "model", "max_tokens"}


class ArmDefinition(_Section):
    """An arm of the study's own: the fields of ``rationales.arms.Arm``, ``scaffold`` by name.

    ``voice`` and ``argues_for`` are for written rationales: neutral and for the target, if not
    said otherwise.
    """

    scaffold: Key
    target: Literal["wrong", "correct"]
    rationale: Key
    voice: Literal["neutral", "persona"] | None = None
    argues_for: Literal["wrong", "correct"] | None = None
    loss_on: Literal["turn", "answer"] = "turn"


class ScaffoldDefinition(_Section):
    """A scaffold of the study's own: the fields of ``evaluation.scaffolds.Scaffold``."""

    tag: Annotated[str, StringConstraints(pattern=r"^[a-z][a-z-]{0,62}$")] | None = None
    generates: bool = False
    forces: Key | None = None


class Definitions(_Section):
    """Arms and scaffolds beside the built-in ones."""

    arms: dict[Key, ArmDefinition] = {}
    scaffolds: dict[Key, ScaffoldDefinition] = {}


class ArmUse(_Section):
    """How the study uses an arm: where its checkpoints come from, and for which sources."""

    origin: Origin
    sources: tuple[Key, ...] | None = None


class TrainingRecipe(_Section):
    """LoRA fine-tuning of one cell.

    ``alpha`` is LoRA's numerator: updates are scaled by alpha / rank, or by alpha / sqrt(rank)
    with ``rslora`` (Kalajdzievski 2023).
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    rslora: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    epochs: Annotated[int, Field(ge=1)] = 1
    examples_per_step: Annotated[int, Field(ge=1)] = 16
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class DriftCheck(_Section):
    """Earlier accuracies of the carry-over cells, and how far ours may be from them.

    ``table`` is a file in the folder that PERSONA_ASSETS_PRIOR_DIR names, else in ``prior/`` of
    the data folder; ``tolerance`` is a difference of accuracies.
    """

    table: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]*\.json$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    tolerance: Annotated[float, Field(ge=0, lt=1)]


class LocalRegistry(_Section):
    """Carry-over checkpoints of a prior study that this study trains and publishes itself.

    ``revision: lock`` takes the hashes of the registry's generated lock file; the resolved hash
    is recorded with every checkpoint. Legal for local registries only.
    """

    kind: Literal["local"]
    revision: Literal["lock"] = "lock"
    prior_training: TrainingRecipe
    drift_tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.0


class HubRegistry(_Section):
    """Carry-over checkpoints in folders of a hub repository at a pinned commit.

    ``folder`` is a pattern over ``{source}``, ``{arm}`` and ``{seed}``; ``format`` says whether a
    folder holds a LoRA adapter or a whole merged model. ``keep: until_evaluated`` removes a
    checkpoint's files from the store once its cell's outcomes have landed (a merged model of 7
    billion parameters has 15 GB); they are fetched again when an evaluation needs them again.
    ``training`` is the recipe they were trained with, as far as it is known: contrasts between
    recipes are flagged by it.
    """

    kind: Literal["hub"]
    repo: str
    revision: Revision
    folder: str
    format: Literal["adapter", "merged"]
    keep: Literal["always", "until_evaluated"] = "always"
    training: TrainingRecipe
    drift: DriftCheck | None = None


class EvaluationSettings(_Section):
    """How the rationale-then-letter protocol is run.

    ``engine``: ``transformers`` (any device), ``vllm`` (a GPU; in the process that evaluates), or
    ``vllm_server`` (the same in a process of its own, which `persona-assets serve` starts and many
    runs talk to). ``serving`` says how an adapter is put to use: ``merged`` into the resident base
    and taken out again, or beside it as an ``adapter``. The two round differently: one a study.
    ``batch_size`` is the persona-questions that are computed together.
    """

    engine: Literal["transformers", "vllm", "vllm_server"] = "transformers"
    serving: Literal["merged", "adapter"] = "merged"
    max_rationale_tokens: Annotated[int, Field(ge=1)] = 768
    batch_size: Annotated[int, Field(ge=1)] = 64
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class EquivalenceTest(_Section):
    """Two one-sided tests against ±margin, each at level alpha (interval of 1 − 2 alpha)."""

    margin: Annotated[float, Field(gt=0)]
    alpha: Annotated[float, Field(gt=0, lt=0.5)]


class PublishedValue(_Section):
    """What an earlier experiment found for a contrast, to be compared with; nothing is tested."""

    estimate: Annotated[float, Field(ge=-1, le=1)]
    interval: tuple[float, float] | None = None


class ContrastSpec(_Section):
    """Arm a − arm b on one or two axes, under the study's registered scaffold.

    ``published`` names an earlier experiment's macro values by axis.
    """

    hypothesis: Annotated[str, StringConstraints(pattern=r"^H[0-9]+$")]
    a: Key
    b: Key
    axes: Annotated[tuple[Axis, ...], Field(min_length=1)]
    equivalence: tuple[EquivalenceTest, ...] = ()
    published: dict[Axis, PublishedValue] = {}


class InferenceSettings(_Section):
    """The registered scaffold, and how intervals and p-values are made."""

    scaffold: Key = "persona_cot"
    resamples: Annotated[int, Field(ge=999)] = 100_000
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    family_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01


class ComputeSettings(_Section):
    """What one worker computes with.

    ``threads`` is part of a checkpoint's identity, since sums depend on their order. ``gpus`` is
    what a run that needs a model reserves on a cluster (a share of one, or 0 for none), and changes
    no result.
    """

    threads: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[float, Field(ge=0)] = 0


class WandbProject(_Section):
    """The Weights & Biases project that a study's runs and bundles go to."""

    project: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,128}$")]
    entity: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,128}$")] | None = None


class HubRepositories(_Section):
    """The hub repositories that a study is uploaded to.

    ``dataset`` gets training datasets and warehouse, ``model`` the adapters, a folder a cell.
    ``license`` is the one that their cards grant, by the hub's name for it (``cc-by-sa-4.0``).
    """

    dataset: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")]
    model: Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,96}/[\w.-]{1,96}$")]
    private: bool = True
    license: Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")] | None = None


class PublishSettings(_Section):
    """Where `persona-assets publish` takes a study; nothing of it changes a result."""

    wandb: WandbProject | None = None
    hub: HubRepositories | None = None


class StudyFile(_Section):
    """The schema of ``data/studies/<name>.yaml``."""

    name: Key
    title: str
    seed: Seed
    demonstration: bool = False
    base_model: Annotated[MiniatureModel | HubModel, Field(discriminator="kind")]
    questions: Annotated[MiniatureQuestions | ArcQuestions, Field(discriminator="kind")]
    rationales: Annotated[OfflineRationales | ChatApiRationales, Field(discriminator="writer")]
    personas: dict[Key, Annotated[str, StringConstraints(min_length=1)]]
    sources: Annotated[tuple[Key, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    define: Definitions = Definitions()
    arms: Annotated[dict[Key, ArmUse], Field(min_length=1)]
    scaffolds: Annotated[tuple[Key, ...], Field(min_length=1)]
    training: TrainingRecipe
    carry_over: Annotated[LocalRegistry | HubRegistry, Field(discriminator="kind")] | None = None
    evaluation: EvaluationSettings
    contrasts: Annotated[tuple[ContrastSpec, ...], Field(min_length=1)]
    inference: InferenceSettings
    compute: ComputeSettings = ComputeSettings()
    publish: PublishSettings = PublishSettings()
