import torch

from rlhf_lightning.batches import InstructionBatch, PreferenceBatch, micro_batches, split_batch

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


def test_margins_and_weights_stay_with_their_pairs():
    margins, weights = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0])
    batch = PreferenceBatch(IDS, MASK, IDS, MASK, torch.arange(3), margins, weights)
    first, second = micro_batches(batch, 2)
    assert torch.equal(first.margins, margins[1:])
    assert torch.equal(second.weights, weights[:1])
    (_, last) = split_batch(batch, 2)
    assert torch.equal(last.margins, margins[2:])


def test_what_is_not_there_stays_away():
    batch = PreferenceBatch(IDS, MASK, IDS, MASK, torch.arange(3))
    for piece in [*micro_batches(batch, 2), *split_batch(batch, 2)]:
        assert piece.margins is None
        assert piece.weights is None
    for piece in micro_batches(InstructionBatch(IDS, MASK, MASK, torch.arange(3)), 1):
        assert piece.position_ids is None
