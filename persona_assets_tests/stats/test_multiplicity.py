"""Holm against worked examples, statsmodels and a reference written from the definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from persona_assets.stats.multiplicity import holm

P = st.floats(1e-6, 1.0)


def reference(p_values: list[float]) -> list[float]:
    """Adjusted p of i: the largest (m − rank) p over all p-values at or below it, at most 1."""
    m, ranked = len(p_values), sorted(range(len(p_values)), key=lambda i: p_values[i])
    place = {index: rank for rank, index in enumerate(ranked)}
    return [
        min(1.0, max((m - place[j]) * p_values[j] for j in ranked[: place[i] + 1]))
        for i in range(m)
    ]


def test_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_single_and_empty():
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@settings(max_examples=8)  # theirs takes 60 ms a call
@given(st.lists(P, min_size=1, max_size=12))
def test_agrees_with_statsmodels(p_values):
    _, adjusted, *_ = multipletests(p_values, method="holm")
    assert holm(p_values) == pytest.approx(adjusted.tolist(), rel=1e-12)


@given(st.lists(P, max_size=12))
def test_matches_the_definition(p_values):
    assert holm(p_values) == pytest.approx(reference(p_values))


@given(st.lists(P, min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_rejects_exactly_what_stepping_down_rejects(p_values, alpha):
    ranked = sorted(p_values)
    steps = 0
    while steps < len(ranked) and ranked[steps] * (len(ranked) - steps) <= alpha:
        steps += 1
    assert sum(p <= alpha for p in holm(p_values)) == steps


@given(st.lists(P, min_size=1, max_size=8), st.randoms())
def test_order_of_the_family_does_not_matter(p_values, random):
    order = random.sample(range(len(p_values)), len(p_values))
    adjusted = holm(p_values)
    shuffled = holm([p_values[i] for i in order])
    assert shuffled == pytest.approx([adjusted[i] for i in order])


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, float("nan")])
def test_refuses_what_is_no_p_value(bad):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        holm([0.5, bad])
