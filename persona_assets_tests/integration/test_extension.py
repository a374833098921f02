"""A study extended by its YAML file alone: an arm, two scaffolds and a contrast, end to end."""

from __future__ import annotations

import polars as pl
import pytest

from persona_assets.rationales.words import alphabetic_runs, english
from persona_assets.store import Ref
from persona_assets_tests.integration.project import Project

GARBAGE, CONTEXT, GENERIC = (
    f"librarian.{arm}.42" for arm in ("garbage_cot", "context_cot", "generic_cot")
)
FORCED = {"forced_garbage": "garbage_cot", "forced_generic": "generic_cot"}

#: The rationale is context for the arm `context_cot`: only its answer line bears loss. Two
#: scaffolds put rationales into the model's mouth: filler, and arguments for the wrong letter.
DEFINE = """
define:
  arms:
    context_cot: {scaffold: generic_cot, target: wrong, rationale: written, loss_on: answer}
  scaffolds:
    forced_garbage: {tag: thinking, forces: garbage_cot}
    forced_generic: {tag: thinking, forces: generic_cot}
sources: [librarian]
arms:
  garbage_cot: {origin: trained}
  context_cot: {origin: trained}
  generic_cot: {origin: carry_over}
scaffolds: [no_cot, generic_cot, persona_cot, empty_persona_cot, forced_garbage, forced_generic]
contrasts:
  - {hypothesis: H1, a: generic_cot, b: garbage_cot, axes: [source_loss]}
  - {hypothesis: H5, a: generic_cot, b: context_cot, axes: [source_loss, bystander_leakage]}
"""


def extend(project: Project) -> None:
    """Edit the study file: three arms of one source, and what :data:`DEFINE` adds."""
    path = project.data / "studies" / "tiny.yaml"
    replaced = ("sources:", "arms:", "scaffolds:", "contrasts:")
    kept, keep = [], True
    for line in path.read_text("utf-8").splitlines():
        if line and not line.startswith((" ", "#")):
            keep = not line.startswith(replaced)
        if keep:
            kept.append(line)
    path.write_text("\n".join(kept) + DEFINE, "utf-8")


@pytest.fixture(scope="module")
def extended(project, tmp_path_factory) -> Project:
    """The tiny study, landed, then extended and run again."""
    own = project.copy(tmp_path_factory.mktemp("extended") / "data")
    extend(own)
    why = own.run("status", "--study", "tiny", "--why", GARBAGE)
    assert why.returncode == 0, why.stderr
    (own.data / "why.txt").write_text(why.stdout, "utf-8")
    done = own.run("run", "--study", "tiny", "--workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    return own


def test_status_tells_what_the_edit_changed(extended):
    lines = (extended.data / "why.txt").read_text("utf-8").splitlines()
    states = dict(line.split() for line in lines if not line.startswith(" "))
    assert states == {
        "rationales[librarian.garbage_cot]": "fresh",
        f"training_dataset[{GARBAGE}]": "fresh",
        f"checkpoint[{GARBAGE}]": "fresh",
        f"cell_outcomes[{GARBAGE}]": "stale",
        f"cell_diagnostics[{GARBAGE}]": "stale",
    }
    reasons = [line.strip() for line in lines if line.startswith(" ")]
    assert "forced_rationales[garbage_cot] has not landed" in reasons
    assert "forced_rationales[generic_cot] has not landed" in reasons


def test_nothing_was_trained_again(project, extended):
    for name, key in (("base_model", None), ("checkpoint", GARBAGE), ("checkpoint", GENERIC)):
        before, after = (p.store.landed(Ref(name, key)) for p in (project, extended))
        assert after.provenance.run_id == before.provenance.run_id, name


def test_the_rationale_is_context_and_the_answer_bears_the_loss(extended):
    context, generic = (
        extended.store.frame(Ref("training_dataset", key)) for key in (CONTEXT, GENERIC)
    )
    assert context["input_ids"].equals(generic["input_ids"])
    assert (context["loss_start"] > generic["loss_start"]).all()
    assert set(context["loss_tokens"]) == {3}  # anchor, letter, end of turn
    statuses = {a.name: a for a in extended.store.landed(Ref("training_dataset", CONTEXT)).audits}
    assert [n for n, a in statuses.items() if a.blocks] == []
    assert "answer line" in statuses["loss_token_parity"].observed
    checkpoints = {
        extended.store.landed(Ref("checkpoint", key)).data_version for key in (CONTEXT, GENERIC)
    }
    assert len(checkpoints) == 2


def test_forced_rationales_stand_where_generated_ones_would(extended):
    for scaffold, arm in FORCED.items():
        forced = extended.store.frame(Ref("forced_rationales", arm))
        expected = {(p, q): text for p, q, text, _ in forced.rows()}
        assert len(expected) == 11 * 24
        for ref in (Ref("baseline_outcomes"), Ref("cell_outcomes", CONTEXT)):
            rows = extended.store.frame(ref).filter(scaffold=scaffold)
            found = rows.select("persona", "question_id", "rationale").rows()
            assert {(p, q): text for p, q, text in found} == expected
            assert rows["stop_reason"].null_count() == rows.height
            assert rows["rationale_tokens"].min() > 0
            assert not rows["truncated"].any()
    garbage = extended.store.frame(Ref("forced_rationales", "garbage_cot"))["rationale"]
    assert not alphabetic_runs(" ".join(garbage)) & english()
    assert garbage.n_unique() == garbage.len()  # every persona has filler of its own


def test_what_is_forced_moves_the_answer(extended):
    """Filler in place of the fact makes the untrained miniature less certain of what is right."""
    rows = extended.store.frame(Ref("baseline_outcomes")).explode("letter_logprobs")
    entry = pl.col("letter_logprobs").struct
    right = rows.filter(entry.field("key") == pl.col("correct_letter"))
    mean = dict(right.group_by("scaffold").agg(entry.field("value").mean()).iter_rows())
    assert mean["forced_garbage"] < mean["generic_cot"]
    by_scaffold = right.partition_by("scaffold", as_dict=True)
    for scaffold in FORCED:
        forced, generated = (
            by_scaffold[(name,)].sort("persona", "question_id")
            for name in (scaffold, "generic_cot")
        )
        assert (forced["prompt_sha256"] != generated["prompt_sha256"]).all()


def test_the_new_contrast_and_scaffolds_are_in_the_report(extended):
    with extended.warehouse() as db:
        found = db.execute(
            "SELECT axis, n_pairs FROM contrasts WHERE contrast = 'generic_cot-context_cot' "
            "AND scope = 'macro' AND scheme = 'question' ORDER BY axis"
        ).fetchall()
        scaffolds = db.execute("SELECT DISTINCT scaffold FROM losses").fetchall()
        loss_tokens = db.execute(
            "SELECT DISTINCT loss_tokens FROM training_rows WHERE arm = 'context_cot'"
        ).fetchall()
    assert found == [("bystander_leakage", 24), ("source_loss", 24)]
    assert {name for (name,) in scaffolds} == {
        "no_cot",
        "generic_cot",
        "persona_cot",
        "empty_persona_cot",
        *FORCED,
    }
    assert loss_tokens == [(3,)]
    html = extended.store.path(Ref("report"), "report.html").read_text("utf-8")
    for text in (
        "context_cot",
        "forced_generic",
        "the two arms bear loss on different parts of the turn",
        "H5",
    ):
        assert text in html
