"""Each seed's own numbers in the ledger: which there are, and that SQL agrees to the last bit."""

from __future__ import annotations

import duckdb
import numpy as np
import polars as pl
import pytest

from persona_assets.reporting.numbers import Tables, study_numbers
from persona_assets.reporting.trace import value_of
from persona_assets.reporting.warehouse import CHECKS_SCHEMA
from persona_assets.stats.contrasts import CONTRASTS_SCHEMA, LOSSES_SCHEMA
from persona_assets.stats.estimands import registered
from persona_assets.stats.estimates import ESTIMATES_SCHEMA, SCHEMES, Sample, estimate
from persona_assets_tests.synthetic import small_study

STUDY = small_study(seeds=[42, 137, 256])
SHAPE = (2, 3, 47)  # sources, seeds, questions: no power of two divides a mean


def numbers_of(row: dict) -> dict:
    """The ledger's numbers of one estimate."""
    estimates = pl.DataFrame([row], schema=ESTIMATES_SCHEMA, orient="row")
    alone = Tables(
        estimates,
        contrasts=pl.DataFrame(schema=CONTRASTS_SCHEMA),
        losses=pl.DataFrame(schema=LOSSES_SCHEMA),
        checks=pl.DataFrame(schema=CHECKS_SCHEMA),
    )
    return {n.number_id: n for n in study_numbers(STUDY, alone) if n.number_id.startswith("contr")}


@pytest.mark.parametrize("contrast", STUDY.contrast_list[4:6], ids=lambda c: c.axis)
@pytest.mark.parametrize("draw", range(4))
def test_sql_finds_the_estimate_each_seed_and_their_spread_to_the_last_bit(
    tmp_path, contrast, draw
):
    estimand = registered(STUDY, contrast)
    n_personas = 1 if contrast.axis == "source_loss" else 4
    rng = np.random.default_rng(draw)
    lost = rng.integers(-n_personas, n_personas + 1, size=(2, *SHAPE))
    rows = [
        (source, arm, seed, estimand.a.scaffold, contrast.axis, f"q{q}", lost[i, s, k, q].item())
        for i, arm in enumerate((contrast.a, contrast.b))
        for s, source in enumerate(STUDY.sources)
        for k, seed in enumerate(STUDY.seeds)
        for q in range(SHAPE[-1])
    ]
    file = tmp_path / "losses.parquet"
    columns = ["source", "arm", "seed", "scaffold", "axis", "question_id", "loss"]
    pl.DataFrame(rows, schema=columns, orient="row").write_parquet(file)
    sample = Sample(estimand, "macro", lost[0] - lost[1], n_personas)
    with duckdb.connect() as db:
        db.execute(f"CREATE TABLE question_losses AS SELECT * FROM '{file}'")
        found = {}
        for scheme in SCHEMES:
            row = estimate(STUDY, sample, scheme) | {"se_ratio": None}
            for number_id, number in numbers_of(row).items():
                if not number_id.endswith("/se_ratio"):
                    found[number_id] = number
                    assert value_of(db, number) == number.value, number_id
    key = f"{estimand.key}/macro"
    assert set(found) == {
        f"{key}/{end}" for end in (*SCHEMES, "seed_42", "seed_137", "seed_256", "seed_sd")
    }
    pairs = SHAPE[0] * SHAPE[2]
    by_seed = [(lost[0] - lost[1])[:, k].sum() / (pairs * n_personas) for k in range(3)]
    assert [found[f"{key}/seed_{seed}"].value for seed in STUDY.seeds] == by_seed
    assert [found[f"{key}/seed_{seed}"].n for seed in STUDY.seeds] == [pairs] * 3
    assert found[f"{key}/seed_sd"].value == pytest.approx(np.std(by_seed, ddof=1), rel=1e-12)


def test_every_contrast_has_its_sources_by_seeds_and_the_macro_of_each_seed(landed):
    found = set(landed.frames["more"]["numbers"]["number_id"])
    ends = [*(f"seed_{seed}" for seed in landed.study.seeds), "seed_sd"]
    wanted = {
        f"{registered(landed.study, contrast).key}/{scope}/{end}"
        for contrast in landed.study.contrast_list
        for scope in ("macro", *landed.study.sources)
        for end in ends
    }
    assert {name for name in found if name.startswith("contrast/") and "/seed_" in name} == wanted
