"""The probe sees any bit of the base's weights move, and nothing where none does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from persona_assets.evaluation.probe import base_unchanged_audit, probe, probe_prompts
from persona_assets.training.checkpoints import adapted
from persona_assets.training.lora import train_adapter
from persona_assets_tests.small_study import dataset, model, tokenizer
from persona_assets_tests.synthetic import small_study

STUDY = small_study()
PROMPTS = probe_prompts(tokenizer(), STUDY.personas)


def test_prompts_are_of_three_personas_and_end_in_the_anchor():
    assert len(set(PROMPTS)) == 3
    for prompt, system in zip(PROMPTS, STUDY.personas.values()):
        assert system in prompt
        assert prompt.endswith("Answer:")


def test_the_same_weights_read_the_same_to_the_last_bit():
    base = model()
    before = probe(base, tokenizer(), PROMPTS)
    assert (before.shape, before.dtype) == ((3, base.config.vocab_size), np.float32)
    found = base_unchanged_audit(before, probe(base, tokenizer(), PROMPTS))
    assert (found.status, found.blocking) == ("passed", True)
    assert found.observed.startswith("the logits of 0 of 3 prompts")


def test_an_adapter_lent_to_the_base_moves_it_and_leaves_no_trace(tmp_path):
    base, cell = model(), STUDY.cells[0]
    before = probe(base, tokenizer(), PROMPTS)
    train_adapter(base, dataset(STUDY, cell), STUDY.training, cell.seed, tmp_path, base_id="base")
    with adapted(base, tmp_path) as lent:
        during = probe(lent, tokenizer(), PROMPTS)
    assert base_unchanged_audit(before, during).blocks
    assert base_unchanged_audit(before, probe(base, tokenizer(), PROMPTS)).status == "passed"


@pytest.mark.parametrize("name", ["q_proj", "down_proj"])
def test_one_weight_that_stays_changed_is_refused(name):
    base = model()
    before = probe(base, tokenizer(), PROMPTS)
    weight = next(p for n, p in base.named_parameters() if f"{name}.weight" in n)
    with torch.no_grad():
        weight[0, 0] += 0.5
    after = probe(base, tokenizer(), PROMPTS)
    found = base_unchanged_audit(before, after)
    assert found.blocks
    largest = np.abs(after.astype(np.float64) - before).max()
    assert (
        f"the logits of 3 of 3 prompts differ from those at loading, by at most {largest:.3g}"
        in (found.observed)
    )


def test_one_bit_of_one_prompt_and_values_that_are_no_numbers_are_seen():
    before = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
    after = before.copy()
    after[1, 0] = np.nextafter(np.float32(3), np.float32(4))
    assert base_unchanged_audit(before, after).observed.startswith("the logits of 1 of 2 prompts")
    after[1, 0] = np.nan
    found = base_unchanged_audit(before, after)
    assert found.blocks
    assert found.observed.endswith("by at most nan")
    assert base_unchanged_audit(after, after.copy()).status == "passed"
