"""The account of the rows of a source."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.data.preparing.counts import Counts, say_counts

NUMBERS = st.integers(0, 9)
REASONS = st.sampled_from(["prompt is null", "refuses the turns: role 'tool'", "cut: prompt", "kept"])
OTHERS = st.sampled_from(["finetune train", "prompt is a duplicate", "validation: of something"])


@given(
    st.tuples(NUMBERS, NUMBERS, NUMBERS),
    st.tuples(*[st.dictionaries(REASONS, NUMBERS).map(Counter)] * 4),
    st.dictionaries(OTHERS, NUMBERS).map(Counter),
)
def test_what_is_said_is_read(totals, groups, others):
    counts = Counts(*totals, *groups, others)
    said = counts.said()
    assert Counts.read(said) == Counts(*totals, *(+group for group in groups), +others)
    assert sum(said.values()) == sum(totals) + sum(group.total() for group in (*groups, others))
    assert all(said.values())


def test_rows_that_nothing_accounts_for_are_noticed():
    counts = Counts(rows=4, kept=2, other_stages=1, dropped=Counter({"prompt is null": 1}))
    counts.check(4)
    counts.check(None)
    assert say_counts(counts.said()) == "rows 4, kept 2, dropped: prompt is null 1, other stages 1"
    with pytest.raises(AssertionError):
        counts.check(5)
    counts.kept += 1
    with pytest.raises(AssertionError):
        counts.check(None)
