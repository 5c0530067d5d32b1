import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.packing import PackedTable, pack
from rlhf_lightning.errors import UserError

LENGTHS = st.lists(st.integers(1, 20), max_size=60).map(np.array)


def plain_best_fit_decreasing(lengths, capacity):
    """The definition, looking through all rows for each example; the tokens of each row."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=rooms.__getitem__)] -= length
    return sorted(capacity - room for room in rooms)


@given(LENGTHS, st.integers(20, 50))
def test_every_example_stands_in_one_row_that_holds_it_and_rows_are_those_of_best_fit_decreasing(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(np.concatenate([[], *rows]).tolist()) == list(range(len(lengths)))
    filled = [int(lengths[row].sum()) for row in rows]
    assert max(filled, default=0) <= capacity
    assert sorted(filled) == plain_best_fit_decreasing(lengths.tolist(), capacity)


def test_rows_by_hand():
    # 7 and 6 open a row each; 4 fits exactly beside 6; 3 exactly beside 7; 2 opens a row.
    rows = pack(np.array([2, 6, 4, 7, 3]), capacity=10)
    assert [row.tolist() for row in rows] == [[3, 4], [1, 2], [0]]


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(UserError, match=r"^an example of 11 tokens does not fit into packed rows of 10 tokens$"):
        pack(np.array([3, 11]), capacity=10)


@given(LENGTHS, st.data())
def test_a_packed_table_holds_what_its_rows_say_and_never_mixes_groups(lengths, data):
    size = len(lengths)
    groups = np.array(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)), dtype=np.int64)
    table = [(f"example {i}", group) for i, group in enumerate(groups.tolist())]
    packed = pickle.loads(pickle.dumps(PackedTable(table, lengths, 20, groups)))  # as it goes to loader processes

    rows = list(packed)
    assert len(packed) == len(rows) == len(packed.groups)
    assert sorted(example for row in rows for example in row) == sorted(table)
    for row, group in zip(rows, packed.groups.tolist(), strict=True):
        assert {own for _, own in row} == {group}
    assert packed.filled == pytest.approx(lengths.sum() / (20 * len(rows)) if rows else 1)


def test_without_groups_rows_have_none():
    packed = PackedTable("abcd", np.array([3, 1, 2, 4]), 5)
    assert [sorted(row) for row in packed] == [["b", "d"], ["a", "c"]]
    assert packed[-1] == packed[1]
    assert packed.groups is None
    assert packed.filled == 1
    with pytest.raises(IndexError):
        packed[2]
