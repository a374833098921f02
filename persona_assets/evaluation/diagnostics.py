"""Audits of what was measured: answers that can be read, not of one letter, not of the base.

All but the first two compare a cell's rows with the baseline's (``outcomes.SCHEMA``), both whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from persona_assets.audit import Audit, Distribution, audit
from persona_assets.questions.bank import Question

#: The letters' share of the next token's probability below which they are not what the model was
#: about to say.
MIN_LETTER_MASS = 0.5
#: Above this share of such answers, a persona × scaffold's accuracy is of another model than the
#: one that would have spoken; the untrained miniature model has none, its least mass is 0.99.
MAX_LOW_MASS = 0.05

#: A persona × scaffold has collapsed when its letters bear less than this share of the baseline's
#: entropy. A model that never gives one of four letters keeps log2(3) / log2(4) = 0.79; chance
#: alone leaves over 0.90 with 96 questions and over 0.99 with 1172 (1 in 100 000 draws).
MIN_ENTROPY_SHARE = 0.75
#: ... or when one letter takes more than this share of its answers: balanced letters take 0.25,
#: by chance at most 0.47 with 96 questions and 0.31 with 1172 (1 in 100 000 draws). The earlier
#: experiment's police officer, right on 34 to 37 % of the questions where the others were right
#: on 88 %, had about 0.8 of its answers on one letter.
MAX_LETTER_SHARE = 0.6

#: Nats by which letter log-probabilities of equal weights may differ, by the model's dtype: two
#: engines agreed within 2.9e-6 in float32 and within 0.037 in bfloat16 on the same prompts.
ROUNDING = {"float32": 1e-4, "bfloat16": 0.05}
#: Share of answers that a checkpoint must change beyond rounding. One that is not applied changes
#: none, one that is not applied to one of 11 personas at most 0.91, and the weakest miniature one
#: (trained on correct letters) all of them, by at least 0.04 nats.
MIN_CHANGED = 0.95
#: ... and of the prompts of each persona × scaffold that shares at least this many: one of 44 that
#: the checkpoint is not applied to leaves 0.98 of all changed, and none of its own.
MIN_CHANGED_OF_EACH, MIN_SHARED = 0.5, 20

_GROUP = ["persona", "scaffold"]
_ROW = [*_GROUP, "question_id"]
_SHOWN = 20

_KEYS = pl.col("letter_logprobs").list.eval(pl.element().struct.field("key"))
_LOGPROBS = pl.col("letter_logprobs").list.eval(pl.element().struct.field("value"))
_MASS = _LOGPROBS.list.eval(pl.element().exp()).list.sum()


def answers_parseable_audit(frame: pl.DataFrame, questions: Sequence[Question]) -> Audit:
    """Whether every row's answer can be read: of the question's own letters, with probabilities.

    Under a protocol that scores letters no answer fails to parse; what can go wrong is that other
    letters were scored than the question has, that a score is no log-probability, or that the
    prediction is not the best of them (ties go to the first letter).

    Args:
        frame: Outcome rows of one cell or of the baseline.
        questions: The bank's evaluation questions.
    """
    bank = pl.DataFrame(
        [(q.id, list(q.letters), q.correct) for q in questions],
        schema={
            "question_id": pl.String,
            "letters": pl.List(pl.String),
            "answer": pl.String,
        },
        orient="row",
    )
    best = _LOGPROBS.list.arg_max()
    faults = {
        "not a question of the bank": pl.col("letters").is_null(),
        "scored letters are not the question's own": pl.col("letters") != _KEYS,
        "a score is not a finite log-probability": ~_LOGPROBS.list.eval(
            pl.element().is_finite().fill_null(False) & (pl.element() <= 0).fill_null(False)
        ).list.all(),
        "probabilities sum to more than 1": _MASS > 1 + 1e-3,
        "prediction is not the best letter": pl.col("predicted_letter").ne_missing(
            _KEYS.list.get(best, null_on_oob=True)
        ),
        "correct letter is not the bank's": pl.col("correct_letter").ne_missing(pl.col("answer")),
        "marked right or wrong against its letters": pl.col("is_correct").ne_missing(
            pl.col("predicted_letter") == pl.col("correct_letter")
        ),
    }
    found = frame.join(bank, on="question_id", how="left", maintain_order="left").select(
        *_ROW, *(fault.fill_null(True).alias(name) for name, fault in faults.items())
    )
    counts = {name: int(found[name].sum()) for name in faults}
    bad = found.filter(pl.any_horizontal(*faults))
    named = "; ".join(f"{n} × {name}" for name, n in counts.items() if n)
    return audit(
        "answers_parseable",
        bad.is_empty(),
        observed=f"{bad.height} of {frame.height} answers cannot be used"
        + (f": {named}" if named else ""),
        threshold="0 answers: the question's own letters, each with a log-probability, and the "
        "best of them predicted",
        remedy="Look at the engine's letters and the bank's normalised labels; log-probabilities "
        "that are not finite mean that the checkpoint's weights have diverged.",
        faults={name: n for name, n in counts.items() if n},
        rows=_named(bad),
    )


def letter_mass_audit(frame: pl.DataFrame) -> Audit:
    """Share of answers whose letters bear little of the next token's probability.

    A warning: the letter with the highest log-probability is then an answer that the model was not
    about to give.
    """
    rows = frame.select(*_GROUP, mass=_MASS)
    shares = (
        rows.group_by(_GROUP, maintain_order=True)
        .agg((pl.col("mass") < MIN_LETTER_MASS).mean().alias("share"), pl.col("mass").min())
        .sort("share", descending=True, maintain_order=True)
    )
    persona, scaffold, worst, least = shares.row(0)
    low = rows.filter(pl.col("mass") < MIN_LETTER_MASS).height
    edges = np.linspace(0, 1, 21)
    return audit(
        "letter_mass",
        worst <= MAX_LOW_MASS,
        observed=f"{low} of {rows.height} answers have less than {MIN_LETTER_MASS:g} of the "
        f"probability on the question's letters; at most {worst:.1%} of a persona × scaffold's "
        f"({persona}/{scaffold}, least mass {least:.2g})",
        threshold=f"at most {MAX_LOW_MASS:.0%} in each persona × scaffold",
        remedy="Read these rows with care: under this scaffold the model was about to say "
        "something other than a letter.",
        blocking=False,
        distribution=Distribution(
            title="probability of the question's letters together",
            axis="share of the next token's probability",
            counted="answers",
            bins=edges.tolist(),
            series={"answers": _histogram(rows["mass"], edges)},
            limits=[MIN_LETTER_MASS],
            limits_of="each answer",
        ),
        shares={f"{p}/{s}": share for p, s, share, _ in shares.rows() if share > 0},
    )


def predicted_letters(frame: pl.DataFrame) -> pl.DataFrame:
    """How varied the predicted letters are, one row a persona × scaffold.

    Args:
        frame: Outcome rows.

    Returns:
        Columns persona, scaffold, answers, entropy (bits), letter (the most predicted, the first
        of equals) and share (of the answers).
    """
    counts = frame.group_by(*_GROUP, "predicted_letter").len("n").sort("predicted_letter")
    share = pl.col("n") / pl.col("n").sum()
    return (
        counts.group_by(_GROUP)
        .agg(
            pl.col("n").sum().cast(pl.Int64).alias("answers"),
            (-share * share.log(2)).sum().abs().alias("entropy"),
            pl.col("predicted_letter").get(pl.col("n").arg_max()).alias("letter"),
            (pl.col("n").max() / pl.col("n").sum()).alias("share"),
        )
        .sort(_GROUP)
    )


def letter_collapse_audit(frame: pl.DataFrame, baseline: pl.DataFrame) -> Audit:
    """Persona × scaffolds in which a cell answers with hardly more than one letter.

    A warning: what such a cell loses is not knowledge of the questions. Entropies are compared on
    the same questions, so that a bank's own imbalance, or questions with 3 or 5 choices, weigh
    alike on both sides; a letter that few questions offer can take no large share, and shows in
    the entropy alone.
    """
    cell = frame["cell"][0]
    table = (
        predicted_letters(frame)
        .join(
            predicted_letters(baseline).select(*_GROUP, baseline_entropy="entropy"),
            on=_GROUP,
            how="left",
            maintain_order="left",
        )
        .with_columns(
            ((pl.col("entropy") < MIN_ENTROPY_SHARE * pl.col("baseline_entropy")).fill_null(True))
            .or_(pl.col("share") > MAX_LETTER_SHARE)
            .alias("collapsed")
        )
        .sort("collapsed", "share", "entropy", descending=[True, True, False], maintain_order=True)
    )
    collapsed, worst = table.filter("collapsed"), table.row(0, named=True)
    choices = frame.unique("question_id")["letter_logprobs"].list.len().value_counts(sort=True)
    return audit(
        "letter_collapse",
        collapsed.is_empty(),
        observed=f"{cell}: {collapsed.height} of {table.height} persona × scaffolds have "
        f"collapsed; the worst is {worst['persona']}/{worst['scaffold']}: "
        f"{worst['letter']} in {worst['share']:.1%} of {worst['answers']} answers, "
        f"{worst['entropy']:.2f} bits"
        + (
            " (the baseline has no such rows)"
            if worst["baseline_entropy"] is None
            else f" against the baseline's {worst['baseline_entropy']:.2f}"
        ),
        threshold=f"at least {MIN_ENTROPY_SHARE:.0%} of the baseline's entropy, and no letter in "
        f"over {MAX_LETTER_SHARE:.0%} of a persona × scaffold's answers",
        remedy="Read the cell's losses under these scaffolds as a preference for a letter, and "
        "name them where its arm is interpreted.",
        blocking=False,
        distribution=_entropies(table),
        collapsed=collapsed.drop("collapsed").to_dicts(),
        questions_by_choices={str(n): questions for n, questions in sorted(choices.rows())},
    )


def _entropies(table: pl.DataFrame) -> Distribution:
    edges = np.linspace(0, 2.4, 25)  # five letters hold at most 2.32 bits
    return Distribution(
        title="entropy of the predicted letters, by persona and scaffold",
        axis="entropy in bits",
        counted="persona × scaffolds",
        bins=[round(edge, 2) for edge in edges.tolist()],
        series={
            "this cell": _histogram(table["entropy"], edges),
            "baseline": _histogram(table["baseline_entropy"].drop_nulls(), edges),
        },
    )


def adapter_effect_audit(frame: pl.DataFrame, baseline: pl.DataFrame, dtype: str) -> Audit:
    """Whether a cell's checkpoint changes the log-probabilities of the letters.

    An engine that silently does not apply an adapter answers like the base; one that mixes
    requests for both may answer so for some personas or scaffolds. Rows are compared where the
    whole prompt is the same (``prompt_sha256``): all rows of scaffolds that generate nothing, and
    of the others those whose rationale came out the same.

    Args:
        frame: A cell's outcome rows.
        baseline: The baseline's, of the same questions.
        dtype: What the model computes in: a key of :data:`ROUNDING`.
    """
    rounding = ROUNDING[dtype]
    pairs = frame.select(*_ROW, "prompt_sha256", now=_LOGPROBS).join(
        baseline.select(*_ROW, "prompt_sha256", base=_LOGPROBS),
        on=[*_ROW, "prompt_sha256"],
        maintain_order="left",
    )
    threshold = (
        f"at least {MIN_CHANGED:.0%} of the prompts that the baseline shares move a letter by "
        f"more than {rounding:g} nats ({dtype} rounding), and {MIN_CHANGED_OF_EACH:.0%} of those "
        f"of each persona × scaffold that shares {MIN_SHARED}"
    )
    remedy = (
        "The checkpoint was not applied, or not to every prompt, or hardly trained: see that the "
        "engine serves it alone and evaluate the cell again."
    )
    if pairs.is_empty():
        found = "no prompt in common with the baseline: nothing to compare"
        return Audit("adapter_effect", "unverifiable", found, threshold, remedy)
    difference = (pl.col("now") - pl.col("base")).list.eval(pl.element().abs()).list.max()
    moved = pairs.select(*_GROUP, difference=difference)
    groups = (
        moved.group_by(_GROUP, maintain_order=True)
        .agg((pl.col("difference") > rounding).mean().alias("share"), pl.len().alias("prompts"))
        .sort("share", maintain_order=True)
    )
    share = float((moved["difference"] > rounding).mean())
    least = groups.row(0, named=True)
    spared = groups.filter(pl.col("share") < MIN_CHANGED_OF_EACH, pl.col("prompts") >= MIN_SHARED)
    return audit(
        "adapter_effect",
        share >= MIN_CHANGED and spared.is_empty(),
        observed=f"{share:.1%} of {moved.height} shared prompts move a letter by more than "
        f"{rounding:g} nats (median {moved['difference'].median():.3g}); least in "
        f"{least['persona']}/{least['scaffold']}: {least['share']:.1%} of {least['prompts']}",
        threshold=threshold,
        remedy=remedy,
        distribution=_movements(moved["difference"], rounding),
        unchanged={
            f"{row['persona']}/{row['scaffold']}": row["share"]
            for row in groups.iter_rows(named=True)
            if row["share"] < MIN_CHANGED
        },
    )


def _movements(difference: pl.Series, rounding: float) -> Distribution:
    exponents = range(-8, 3)
    edges = np.array([-np.inf, *(10.0**e for e in exponents), np.inf])
    return Distribution(
        title=f"the letter that moves most, prompt by prompt (rounding: {rounding:g} nats)",
        axis="difference from the baseline in nats, up to",
        counted="prompts",
        bins=[*(f"1e{e}" for e in exponents), "more"],
        series={"prompts": np.histogram(difference, edges)[0].tolist()},
    )


def _histogram(values: pl.Series, edges: np.ndarray) -> list[float]:
    """Counts between the edges, what lies beyond them in the outermost bins."""
    return np.histogram(values.clip(edges[0], edges[-1]), edges)[0].tolist()


def _named(rows: pl.DataFrame) -> list[str]:
    return ["/".join(row) for row in rows.select(_ROW).head(_SHOWN).iter_rows()]
