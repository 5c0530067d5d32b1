"""Examples of rows as ids."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.encode import EncodedRow
from rlhf_lightning.data.preparing.examples import ranked_pairs
from rlhf_lightning.data.rows import Row

RANKED = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(5, 6), min_size=1, max_size=2)), max_size=5)


@given(RANKED, st.lists(st.integers(5, 6), max_size=3), st.booleans())
def test_a_ranking_becomes_each_pair_that_says_something_once_and_weighs_as_one_row(ranked, prompt, remove_same):
    ranked = sorted(ranked, key=lambda response: response[0])  # the best first, as rows hold them
    ranks = tuple(float(rank) for rank, _ in ranked)
    ids = [np.array(response, np.int32) for _, response in ranked]
    row = Row("asked", tuple("said" for _ in ranked), ranks, margin=0.5, weight=3.0, row_id=7)
    pairs = ranked_pairs(row, EncodedRow(np.array(prompt, np.int32), ids[0][:0] if ids else ids, ids), remove_same)

    wanted = [
        (prompt + better, prompt + worse)
        for (a, better), (b, worse) in combinations(ranked, 2)
        if a < b and not (remove_same and better == worse)
    ]
    assert [(pair.chosen_ids.tolist(), pair.rejected_ids.tolist()) for pair in pairs] == wanted
    assert all((pair.prompt_length, pair.row_id, pair.margin) == (len(prompt), 7, 0.5) for pair in pairs)
    assert sum(pair.weight for pair in pairs) == (pytest.approx(3.0) if pairs else 0)
    assert len({pair.weight for pair in pairs}) <= 1


@given(RANKED, st.floats(-1, 1))
def test_ties_with_a_margin_are_pairs_either_way_round_of_half_the_weight(ranked, tie_margin):
    ranked = sorted(ranked, key=lambda response: response[0])
    ids = [np.array(response, np.int32) for _, response in ranked]
    row = Row("asked", tuple("said" for _ in ranked), tuple(float(rank) for rank, _ in ranked), margin=0.5, weight=3.0)
    encoded = EncodedRow(np.array([9], np.int32), np.zeros(0, np.int32), ids)
    pairs = ranked_pairs(row._replace(tie_margin=tie_margin), encoded, remove_same=True)

    couples = [(a, b) for a, b in combinations(ranked, 2) if a[1] != b[1]]
    wanted = []
    for (rank, better), (other, worse) in couples:
        sides, share = ([9, *better], [9, *worse]), 3.0 / len(couples)
        if rank < other:
            wanted.append((*sides, 0.5, share))
        else:
            wanted += [(*sides, tie_margin, share / 2), (*reversed(sides), tie_margin, share / 2)]
    found = [(p.chosen_ids.tolist(), p.rejected_ids.tolist(), p.margin, p.weight) for p in pairs]
    assert [pair[:3] for pair in found] == [pair[:3] for pair in wanted]
    assert [pair[3] for pair in found] == pytest.approx([pair[3] for pair in wanted])
    assert ranked_pairs(row, encoded, remove_same=True) == [] or all(
        p.margin == 0.5 for p in ranked_pairs(row, encoded, True)
    )
