import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_assets.evaluation.engines.token_trees import Branch, TokenTrees, common_length
from persona_assets_tests.evaluation import small

MODEL = small.model(small.word_tokenizer())


def plain(path):
    """Next-token logits after a path, by an unpadded forward pass."""
    with torch.inference_mode():
        return MODEL(torch.tensor([path])).logits[0, -1]


def assert_same(logits, path):
    torch.testing.assert_close(logits, plain(path), atol=1e-4, rtol=0)


@pytest.fixture
def trees():
    """Three trunks of 3, 1 and no tokens; room that is too small for what the tests add."""
    with torch.inference_mode():
        yield TokenTrees(MODEL, [[5, 6, 7], [8], []], room=2)


def test_branches_see_the_trunk_and_themselves_only(trees):
    step = trees.pack(
        [
            [Branch(0, [10, 11], 3), Branch(1, [12], 3)],
            [Branch(0, [13], 1), Branch(1, [14, 15, 16], 1)],
            [Branch(1, [17], 0)],
        ]
    )
    assert step.ids.tolist() == [[0, 10, 11, 12], [14, 15, 13, 16], [0, 0, 0, 17]]
    assert step.position.tolist() == [[0, 3, 4, 3], [1, 2, 1, 3], [0, 0, 0, 0]]
    logits = trees.forward(step, keep=2)
    assert_same(logits[0, 0], [5, 6, 7, 10, 11])
    assert_same(logits[0, 1], [5, 6, 7, 12])
    assert_same(logits[1, 0], [8, 13])
    assert_same(logits[1, 1], [8, 14, 15, 16])
    assert_same(logits[2, 1], [17])


def test_a_branch_goes_on_from_any_of_its_tokens(trees):
    rows = [[Branch(0, [10, 11, 12], 3), Branch(1, [13], 3)], [Branch(0, [9], 1)], []]
    trees.forward(trees.pack(rows), keep=2)
    rows = [[Branch(0, [14], 5), Branch(1, [15], 2)], [Branch(0, [16], 2)], [Branch(3, [17], 0)]]
    logits = trees.forward(trees.pack(rows), keep=2)
    assert_same(logits[0, 0], [5, 6, 7, 10, 11, 14])
    assert_same(logits[0, 1], [5, 6, 15])
    assert_same(logits[1, 1], [8, 9, 16])
    assert_same(logits[2, 1], [17])


def test_retired_rows_keep_what_they_hold(trees):
    trees.forward(trees.pack([[Branch(0, [10], 3)], [Branch(0, [11], 1)], [Branch(0, [12], 0)]]), 1)
    assert trees.retire(3, {0}) == [2, 1]
    assert trees.order == [2, 1, 0]
    logits = trees.forward(trees.pack([[Branch(0, [13], 1)], [Branch(0, [14], 2)]]), 1)
    assert_same(logits[0, 0], [12, 13])
    assert_same(logits[1, 0], [8, 11, 14])
    rows = [[Branch(0, [15], 2)], [Branch(0, [16], 3)], [Branch(0, [17], 4)]]
    logits = trees.forward(trees.pack(rows), 1)
    assert_same(logits[0, 0], [12, 13, 15])
    assert_same(logits[1, 0], [8, 11, 14, 16])
    assert_same(logits[2, 0], [5, 6, 7, 10, 17])


@settings(max_examples=50)
@given(gone=st.lists(st.sets(st.integers(0, 5)), max_size=4))
@torch.inference_mode()
def test_rows_that_stay_come_first_whatever_goes(gone):
    trees = TokenTrees(MODEL, [[row] for row in range(6)], room=1)
    live = list(range(6))
    for rows in gone:
        rows = {row for row in rows if row < len(live)}
        left = {tree for at, tree in enumerate(live) if at not in rows}
        live = [live[at] for at in trees.retire(len(live), rows)]
        assert set(live) == left
        assert trees.order[: len(live)] == live
        assert sorted(trees.order) == list(range(6))


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_length_is_that_of_the_longest_shared_start(a, b):
    n = common_length(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
