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
