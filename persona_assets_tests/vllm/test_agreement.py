"""vLLM on a CPU, in float32, gives what transformers gives: base, adapters, whole models."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from benchmarks.engine_agreement import compare
from persona_assets_tests.vllm.conftest import load, merged_model, other_model

#: Nats. Float32 sums in another order came to 2e-6 (merged); adapters move far more.
TOLERANCE = 2e-4
FAR = 100 * TOLERANCE


def agree(expected, found) -> None:
    """Disagreements are shown with both distributions."""
    agreement = compare(expected, found)
    assert agreement.rows == expected.height
    assert agreement.same_letter >= 0.995, agreement.listed
    assert agreement.same_rationale == agreement.same_stop == 1, agreement.listed
    assert agreement.largest < TOLERANCE, agreement.figures()


@pytest.fixture(scope="session")
def expected(material):
    """What transformers answers, by checkpoint."""
    return _expected(material)


def _expected(material):
    model = load(material.base)
    found = {}
    for checkpoint in material.checkpoints.values():
        with material.reference(model, checkpoint) as engine:
            found[checkpoint] = material.answers(engine)
    return found


def moved(one, other) -> float:
    """The median difference of a letter's log-probability where nothing is generated, in nats."""
    values = [
        np.array([[e["value"] for e in row] for row in f.sort(ROW)["letter_logprobs"]])
        for f in (frame.filter(scaffold="no_cot") for frame in (one, other))
    ]
    return float(np.median(np.abs(values[0] - values[1])))


ROW = ["persona", "scaffold", "question_id"]


def test_the_material_is_worth_comparing_on(material, expected):
    """Several letters, texts and stops; each adapter has an effect, and another one."""
    for frame in expected.values():
        assert (frame["predicted_letter"].value_counts()["count"] >= 5).sum() >= 3
        assert frame["rationale"].n_unique() >= 40
    assert len({r for f in expected.values() for r in f["stop_reason"].drop_nulls()}) >= 2
    base, one, other = expected.values()
    assert min(moved(base, one), moved(base, other), moved(one, other)) > FAR


@pytest.mark.parametrize("mode", ["merging", "beside"])
@pytest.mark.parametrize("number", range(3), ids=["base", "first adapter", "second adapter"])
def test_vllm_answers_what_transformers_answers(request, material, expected, mode, number):
    serving = request.getfixturevalue(mode)
    checkpoint = list(material.checkpoints.values())[number]
    agree(expected[checkpoint], serving.answers(checkpoint))
    assert serving.base_is_unchanged()


def test_adapters_merged_and_beside_the_base_agree_and_differ_from_it(material, merging, beside):
    base = merging.answers(None)
    for adapter in material.adapters:
        agree(merging.answers(adapter), beside.answers(adapter))
        assert moved(base, beside.answers(adapter)) > FAR


def test_checkpoints_may_follow_each_other_in_any_order(material, merging):
    """And the base that is asked between them is the base."""
    one, other = material.adapters
    for checkpoint in (other, one, None, one):
        agree(merging.answers(checkpoint), merging.measure(checkpoint))


@pytest.mark.parametrize("mode", ["merging", "beside"])
def test_a_whole_model_is_served_in_the_bases_place(request, material, mode, tmp_path):
    """With tied embeddings: every tensor is another, the head that shares one of them too."""
    serving = request.getfixturevalue(mode)
    whole = other_model(material, tmp_path / "whole")
    with material.reference(load(whole), None) as engine:
        agree(material.answers(engine), serving.measure(whole))
    assert serving.base_is_unchanged()


def test_a_tied_head_may_be_saved_beside_the_embeddings_and_is_not_read(
    material, merging, tmp_path
):
    once = other_model(material, tmp_path / "once")
    twice = shutil.copytree(once, tmp_path / "twice")
    tensors = load_file(once / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = 0 * tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, twice / "model.safetensors")
    probes = []
    for folder in (once, twice):
        with merging.host.serving(folder):
            probes.append(merging.probe())
    assert np.array_equal(*probes)
    assert not np.array_equal(probes[0], merging.before)
    assert merging.base_is_unchanged()


def test_a_whole_model_of_an_untied_base_is_served(untied, merging_untied, tmp_path):
    serving = merging_untied
    expected = _expected(untied)
    agree(expected[None], serving.answers(None))
    (adapter,) = untied.adapters
    agree(expected[adapter], serving.answers(adapter))
    whole = other_model(untied, tmp_path / "whole")
    with untied.reference(load(whole), None) as engine:
        agree(untied.answers(engine), serving.measure(whole))
    assert serving.base_is_unchanged()


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_a_merged_model_saved_whole_is_its_adapter_merged(request, kind, tmp_path):
    """To the last bit: what carry-over checkpoints hold."""
    serving = request.getfixturevalue({"tied": "merging", "untied": "merging_untied"}[kind])
    adapter = serving.material.adapters[0]
    whole = merged_model(serving.material, adapter, tmp_path / "whole")
    probes = []
    for folder in (adapter, whole):
        with serving.host.serving(folder):
            probes.append(serving.probe())
    assert np.array_equal(*probes)
    assert not np.array_equal(probes[0], serving.before)
    agree(serving.answers(adapter), serving.measure(whole))
    assert serving.base_is_unchanged()
