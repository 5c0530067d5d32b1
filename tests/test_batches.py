"""How batches are cut."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.batches import (
    InstructionBatch,
    PreferenceBatch,
    length_sorted_pieces,
    micro_batches,
)

MASK = torch.tensor([[True, True, False, False], [True] * 4, [True, True, True, False]])
IDS = torch.arange(12).view(3, 4)


def test_packed_rows_are_split_whole_longest_first_and_keep_all_their_row_ids():
    rows = torch.tensor([[1, -1, -1, -1, -1], [2, 3, 4, 5, 6], [7, 8, -1, -1, -1]])
    places = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]])
    first, second = micro_batches(InstructionBatch(IDS, MASK, MASK, rows, places), 2)

    assert first.input_ids.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert first.position_ids.tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]
    assert first.row_ids.tolist() == rows[1:].tolist()
    assert second.input_ids.tolist() == [[0, 1]]
    assert second.position_ids.tolist() == [[0, 1]]
    assert second.row_ids.tolist() == rows[:1].tolist()


def test_what_is_said_of_each_pair_stays_with_it():
    margins, weights, prompts = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2, 1, 3])
    batch = PreferenceBatch(IDS, MASK, IDS, MASK, torch.arange(3), margins, weights, prompts)
    first, second = micro_batches(batch, 2)
    assert torch.equal(first.margins, margins[1:])
    assert torch.equal(second.weights, weights[:1])
    assert (first.prompt_lengths.tolist(), second.prompt_lengths.tolist()) == ([1, 3], [2])


def test_what_is_not_there_stays_away():
    batch = PreferenceBatch(IDS, MASK, IDS, MASK, torch.arange(3))
    for piece in micro_batches(batch, 2):
        assert piece.margins is None
        assert piece.weights is None
        assert piece.prompt_lengths is None
    for piece in micro_batches(InstructionBatch(IDS, MASK, MASK, torch.arange(3)), 1):
        assert piece.position_ids is None


def test_a_budget_holds_few_long_rows_or_many_short_ones():
    lengths = torch.tensor([2, 9, 1, 4, 3, 12, 2])
    pieces = length_sorted_pieces(lengths, None, 8)
    assert [piece.tolist() for piece in pieces] == [[5], [1], [3, 4], [0, 6, 2]]  # the first two go alone
    assert [piece.tolist() for piece in length_sorted_pieces(lengths, 2, 8)] == [[5], [1], [3, 4], [0, 6], [2]]
    assert [piece.tolist() for piece in length_sorted_pieces(lengths, 4, None)] == [[5, 1, 3, 4], [0, 6, 2]]


def test_parts_that_are_padded_apart_count_with_their_own_width():
    lengths = torch.tensor([[1, 5], [5, 1], [1, 4], [2, 2]])
    assert [piece.tolist() for piece in length_sorted_pieces(lengths, None, 12)] == [[0], [1], [2, 3]]
    assert [piece.tolist() for piece in length_sorted_pieces(lengths, None, 20)] == [[0, 1], [2, 3]]


def test_the_largest_pieces_are_halved_until_there_are_enough():
    lengths = torch.tensor([5, 5, 2, 2, 2, 2, 2])
    assert [piece.tolist() for piece in length_sorted_pieces(lengths, None, 10, 3)] == [[0], [1], [2, 3, 4, 5, 6]]
    assert [len(piece) for piece in length_sorted_pieces(lengths, None, 10, 4)] == [1, 1, 3, 2]
    assert [len(piece) for piece in length_sorted_pieces(lengths, None, None, 2)] == [4, 3]
    with pytest.raises(ValueError, match="fewer rows than pieces"):
        length_sorted_pieces(lengths, None, None, 8)


@given(
    st.integers(1, 3).flatmap(
        lambda parts: st.lists(st.lists(st.integers(0, 9), min_size=parts, max_size=parts), min_size=1, max_size=12)
    ),
    st.none() | st.integers(1, 5),
    st.none() | st.integers(1, 60),
    st.data(),
)
def test_pieces_hold_every_row_once_within_all_limits(rows, size, max_tokens, data):
    least = data.draw(st.integers(1, len(rows)))
    pieces = [piece.tolist() for piece in length_sorted_pieces(torch.tensor(rows), size, max_tokens, least)]
    order = [index for piece in pieces for index in piece]
    totals = [sum(rows[index]) for index in order]

    def tokens(piece):
        return len(piece) * sum(max(part) for part in zip(*(rows[index] for index in piece), strict=True))

    assert sorted(order) == list(range(len(rows)))
    assert totals == sorted(totals, reverse=True)
    assert len(pieces) >= least
    assert all(piece for piece in pieces)
    for piece in pieces:
        assert size is None or len(piece) <= size
        assert max_tokens is None or len(piece) == 1 or tokens(piece) <= max_tokens
    greedy = [piece.tolist() for piece in length_sorted_pieces(torch.tensor(rows), size, max_tokens)]
    assert len(pieces) == max(least, len(greedy))
    for piece, following in pairwise(greedy):  # no piece could have taken one more
        assert len(piece) == size or tokens([*piece, following[0]]) > max_tokens


def test_batches_within_a_budget():
    instructions = InstructionBatch(IDS, MASK, MASK, torch.arange(3))
    assert micro_batches(instructions) == [instructions]
    pieces = micro_batches(instructions, max_tokens=7)
    assert [(p.row_ids.tolist(), p.input_ids.shape[1]) for p in pieces] == [([1], 4), ([2, 0], 3)]
    # A pair is two sequences as wide as the longer.
    pairs = PreferenceBatch(IDS, MASK, IDS, MASK.flip(0), torch.arange(3))
    assert [p.row_ids.tolist() for p in micro_batches(pairs, max_tokens=16)] == [[1, 0], [2]]
    assert [p.row_ids.tolist() for p in micro_batches(pairs, max_tokens=18, min_pieces=3)] == [[1], [0], [2]]


def test_what_the_model_is_shown_may_be_told():
    pairs = PreferenceBatch(IDS, MASK, IDS, MASK, torch.arange(3))
    pieces = micro_batches(pairs, max_tokens=12, lengths=torch.tensor([6, 4, 3]))
    assert [(p.row_ids.tolist(), p.chosen_ids.shape[1]) for p in pieces] == [([0, 1], 4), ([2], 3)]
