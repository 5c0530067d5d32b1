"""How experience is cut and joined."""

from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.algorithms.online.experience import Experience


def numbered(size):
    """Experience whose every field says which example it belongs to."""
    column = torch.arange(size)
    wide = column.unsqueeze(1).expand(size, 3)
    narrow = {"ended", "scores", "row_ids"}
    tensors = [name for name in Experience._fields if name != "shared"]
    return Experience(**{name: column if name in narrow else wide for name in tensors})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_sequences_join_prompts_and_responses():
    experience = numbered(2)._replace(
        prompt_ids=torch.tensor([[0, 5], [6, 7]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        response_ids=torch.tensor([[8, 9, 2], [2, 0, 0]]),
        response_mask=torch.tensor([[True, True, True], [True, False, False]]),
    )
    assert experience.sequences.tolist() == [[0, 5, 8, 9, 2], [6, 7, 2, 0, 0]]
    expected = [[False, True, True, True, True], [True, True, True, False, False]]
    assert experience.sequence_mask.tolist() == expected


def test_micro_batches_hold_each_row_once_longest_first_and_no_column_of_padding_alone():
    experience = numbered(3)._replace(
        prompt_ids=torch.tensor([[0, 0, 5], [6, 7, 8], [0, 9, 5]]),
        prompt_mask=torch.tensor([[False, False, True], [True, True, True], [False, True, True]]),
        response_ids=torch.tensor([[2, 0, 0], [3, 4, 2], [2, 0, 0]]),
        response_mask=torch.tensor([[True, False, False], [True, True, True], [True, False, False]]),
        row_ids=torch.arange(3),
    )
    first, second, third = experience.micro_batches(1)
    assert [piece.row_ids.tolist() for piece in (first, second, third)] == [[1], [2], [0]]
    assert first.sequences.tolist() == [[6, 7, 8, 3, 4, 2]]
    assert second.sequences.tolist() == [[9, 5, 2]]
    assert third.sequences.tolist() == [[5, 2]]
    wide, narrow = experience.micro_batches(2)
    assert wide.sequences.tolist() == [[6, 7, 8, 3, 4, 2], [0, 9, 5, 2, 0, 0]]
    assert narrow.row_ids.tolist() == [0]
    short = experience.select(torch.tensor([0, 2, 0])).micro_batches()[0]
    assert short.sequences.tolist() == [[9, 5, 2], [0, 5, 2], [0, 5, 2]]  # as wide as its longest row, not as all rows


def test_micro_batches_within_a_budget_count_both_paddings():
    prompts = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    responses = torch.tensor([[True, False, False], [True, False, False], [True, True, True]])
    experience = numbered(3)._replace(prompt_mask=prompts, response_mask=responses)
    pieces = experience.micro_batches(max_tokens=8)
    assert [piece.row_ids.tolist() for piece in pieces] == [[1], [2], [0]]  # 1 and 2 together are 6 wide
    assert [piece.row_ids.tolist() for piece in experience.micro_batches(max_tokens=12)] == [[1, 2], [0]]
    assert [len(piece.scores) for piece in experience.micro_batches(max_tokens=99, min_pieces=2)] == [2, 1]
    assert [len(piece.scores) for piece in experience.micro_batches()] == [3]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_is_a_permutation(size, count, epochs, seed):
    rows = size * count
    minibatches = list(numbered(rows).minibatches(epochs, size, seeded(seed)))
    assert len(minibatches) == epochs * count
    for epoch in range(epochs):
        part = minibatches[epoch * count : (epoch + 1) * count]
        assert Counter(row for piece in part for row in piece.row_ids.tolist()) == Counter(range(rows))
    for piece in minibatches:
        assert len(piece.scores) == size
        for field in piece.tensors.values():  # all fields of an example stay together
            assert torch.equal(field if field.dim() == 1 else field[:, 0], piece.row_ids)


def orders(seed, epochs=3):
    return [piece.row_ids.tolist() for piece in numbered(12).minibatches(epochs, 12, seeded(seed))]


def test_the_order_is_new_each_epoch_and_comes_from_the_generator():
    first = orders(1)
    assert first[0] != first[1] != first[2]
    torch.rand(5)
    assert orders(1) == first
    assert orders(2) != first
