"""Token-budget parity: which rows pass, which fail, and which can never be said to pass."""

from __future__ import annotations

import polars as pl
import pytest

from persona_assets_tests.training.material import (
    CONTEXT,
    CONTRADICTING,
    CORRECT,
    GARBAGE,
    GENERIC,
    PERSONA,
    SCRAMBLED,
    WRITTEN,
    matched,
)


def parity(material, arm, frame=None):
    return material.audits(arm, frame)["loss_token_parity"]


@pytest.mark.parametrize("arm", [GARBAGE, SCRAMBLED, GENERIC])
def test_one_row_too_long(material, arm):
    """Constructed rows may be 2 tokens off; a reference row is its own reference."""
    frame = matched(material.dataset(arm))
    allowed = 0 if arm == GENERIC else 2
    close, far, farther = (
        frame.with_columns(
            reference_loss_tokens=pl.col("loss_tokens")
            - pl.when(pl.col("position") == 5).then(n).otherwise(0)
        )
        for n in (allowed, allowed + 1, -15)
    )
    assert material.failures(arm, close) == []
    found = material.only_failure("loss_token_parity", arm, far)
    assert found.blocks
    tokens = frame["loss_tokens"][5]
    assert found.details["worst_row"] == {
        "question_id": frame["question_id"][5],
        "tokens": tokens,
        "reference_tokens": tokens - allowed - 1,
        "difference": allowed + 1,
    }
    assert found.details["total"] - found.details["reference_total"] == allowed + 1
    drawn = found.distribution
    middle = [(a + b) / 2 for a, b in zip(drawn.bins, drawn.bins[1:])]
    seen = {m: n for m, n in zip(middle, drawn.series["rows"]) if n}
    assert seen == {0: frame.height - 1, allowed + 1: 1}
    assert drawn.limits == [-allowed - 0.5, allowed + 0.5]
    drawn = parity(material, arm, farther).distribution
    assert drawn.series["rows"][0] == 1
    assert "1 rows beyond ±10" in drawn.title


@pytest.mark.parametrize("arm", [PERSONA, CONTRADICTING, CORRECT])
@pytest.mark.parametrize(
    ("ratio", "failed"),
    [(1.19, []), (1.21, ["loss_token_parity"]), (0.81, []), (0.79, ["loss_token_parity"])],
)
def test_written_rows_too_long_or_short_on_average(material, arm, ratio, failed):
    frame = material.dataset(arm)
    each, more = divmod(round(frame["loss_tokens"].sum() / ratio), frame.height)
    references = pl.Series([each + (i < more) for i in range(frame.height)], dtype=pl.Int32)
    frame = frame.with_columns(reference_loss_tokens=references)
    assert material.failures(arm, frame) == failed
    found = parity(material, arm, frame)
    mean = frame["loss_tokens"].sum() / frame.height
    reference = references.sum() / frame.height
    assert found.observed.startswith(
        f"mean {mean:.2f} tokens a row, {mean / reference - 1:+.1%} of the reference arm's "
        f"{reference:.2f}; {found.details['total']} in all, "
    )
    assert found.details["total"] == frame["loss_tokens"].sum()
    assert found.details["reference_total"] == references.sum()
    assert found.distribution.limits == pytest.approx([0.8 * reference, 1.2 * reference], abs=0.01)
    for bars in found.distribution.series.values():
        assert sum(bars) == frame.height


@pytest.mark.parametrize("arm", [GARBAGE, SCRAMBLED, GENERIC])
def test_a_row_that_lost_its_reference(material, arm):
    """Constructed rows and the reference arm's have one each, or were dropped with it."""
    gone = pl.when(pl.col("position") != 5).then("reference_loss_tokens")
    frame = material.dataset(arm).with_columns(reference_loss_tokens=gone)
    found = material.only_failure("loss_token_parity", arm, frame)
    assert found.blocks
    assert found.observed.endswith("; 1 rows without a reference row")


@pytest.mark.parametrize(("lost", "failed"), [(18, []), (19, ["loss_token_parity"])])
def test_written_rows_may_lack_as_many_references_as_may_be_dropped(miniature, lost, failed):
    """30 % of 60 rows."""
    gone = pl.when(pl.col("position") >= lost).then("reference_loss_tokens")
    frame = miniature.dataset(PERSONA).with_columns(reference_loss_tokens=gone)
    assert miniature.failures(PERSONA, frame) == failed


def test_without_references_parity_fails(miniature):
    bare = miniature.dataset(GARBAGE).with_columns(reference_loss_tokens=pl.lit(None, pl.Int32))
    assert miniature.failures(GARBAGE, bare) == ["loss_token_parity"]


def test_rows_without_a_reference_are_counted_and_left_out(miniature):
    frame = miniature.dataset(PERSONA)
    gone = pl.when(pl.col("position") >= 4).then("reference_loss_tokens")
    found = parity(miniature, PERSONA, frame.with_columns(reference_loss_tokens=gone))
    assert (found.details["rows"], found.details["rows_without_reference"]) == (56, 4)
    assert found.details["total"] == frame.filter(pl.col("position") >= 4)["loss_tokens"].sum()


@pytest.mark.parametrize("arm", WRITTEN)
@pytest.mark.parametrize("off", [0, 30])
def test_parity_of_carried_over_cells_is_unverifiable(material, arm, off):
    material = material.carried_over
    frame = material.dataset(arm).with_columns(pl.col("reference_loss_tokens") + off)
    assert frame["reference_only"].all()
    found = parity(material, arm, frame)
    assert (found.status, found.blocks) == ("unverifiable", False)
    assert found.observed.endswith("; not what this checkpoint saw")
    assert found.details["rows"] == frame.height
    assert material.failures(arm, frame) == ["loss_token_parity"]


def test_the_reference_arm_is_said_to_be_its_own(material):
    assert parity(material, GENERIC).observed.startswith("each row is its own reference: ")


def test_loss_on_the_answer_only_is_a_warning(material):
    frame = material.dataset(CONTEXT)
    found = parity(material, CONTEXT)
    assert (found.status, found.blocking) == ("failed", False)
    tokens = set(frame["loss_tokens"])
    (loss,) = tokens
    assert found.observed.startswith(
        f"the loss is on the answer line only: {loss}.00 loss tokens a row, "
    )
    assert found.details["loss_tokens_mean"] == loss < found.details["mean"] / 4
    assert found.details["total"] == frame["reference_loss_tokens"].sum()  # whole, equal turns


def test_a_context_of_another_length_blocks(material):
    frame = material.dataset(CONTEXT).with_columns(pl.col("reference_loss_tokens") * 3 // 2)
    assert material.failures(CONTEXT, frame) == ["loss_token_parity"]
