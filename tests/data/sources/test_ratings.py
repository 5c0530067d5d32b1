"""Ratings in words as the margins that they stand for."""

from __future__ import annotations

import pytest

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import PreferenceDataModule, Table, UserError
from rlhf_lightning.data.rows import BadRowError
from rlhf_lightning.data.sources.ratings import margins_of, read_rating
from rlhf_lightning.data.sources.row_forms import RowForm

PAIR = {"prompt": "p", "chosen": "r", "rejected": "x"}
LLAMA_2 = ["Significantly better", "better", "slightly-better", "negligibly better / unsure", "unsure"]


def rated(rating, **others):
    return PAIR | {"rating": rating} | others


def read(row, ratings, names=None):
    return RowForm(list(row), names, ratings=ratings and margins_of(ratings)).read(row, "preference")


@pytest.mark.parametrize(("table", "margins"), [("small", [1, 2 / 3, 1 / 3, 0, 0]), ("large", [3, 2, 1, 0, 0])])
def test_the_tables_of_llama_2(table, margins):
    assert [read(rated(rating), table).margin for rating in LLAMA_2] == margins
    assert read(rated("Negligibly better"), table).margin == 0


def test_a_table_of_one_s_own_of_words_or_numbers():
    ratings = {"Much Better": 0.5, "2": 0.25}
    assert [read(rated(each), ratings).margin for each in ("much better", 2, 2.0, "2", None)] == [0.5, *[0.25] * 3, 0]
    named = PAIR | {"confidence": "much_better"}
    assert read(named, ratings, {"rating": "confidence"}).margin == 0.5
    assert read(PAIR | {"margin": 7}, ratings).margin == 7


def test_without_a_table_ratings_are_named_as_unread():
    row = read(rated("whatever"), None)
    assert (row.margin, row.unused) == (0, ("column 'rating'",))
    assert read(rated("better"), "small").unused == ()


@pytest.mark.parametrize("rating", ["great", "", True, 1, ["better"]])
def test_an_unknown_rating_names_those_that_are_known(rating):
    with pytest.raises(BadRowError, match=r"rating .* is none of much_better, same$"):
        read(rated(rating), {"much better": 1, "same": 0})
    with pytest.raises(BadRowError, match="rating stands beside a margin"):
        read_rating("same", "rating", {"same": 0.0}, 0.0)


def test_tables_that_cannot_be_are_refused():
    for ratings, message in [
        ("smaller", "'smaller' is none of small, large"),
        ({"a": 1.0, "A": 2.0}, "must name one rating or more, each once"),
        ({}, "must name one rating or more, each once"),
    ]:
        with pytest.raises(UserError, match=message):
            margins_of(ratings)
    for kind in (lambda **given: Table("nowhere", **given), lambda **given: PreferenceDataModule("nowhere", **given)):
        with pytest.raises(UserError, match="rating_margins"):
            kind(rating_margins={"a": -1.0})
        with pytest.raises(UserError, match="rating_margins"):
            kind(rating_margins="smaller")


def test_batches_ask_for_the_margins_and_a_bad_row_is_named():
    rows = [rated("better", prompt="one"), rated(None, prompt="two"), PAIR | {"prompt": "three"}]

    def margins(data, **given):
        module = PreferenceDataModule(tiny_tokenizer(), data, validation_split=0.0, **given)
        module.setup("fit")
        (batch,) = module.train_dataloader()
        return dict(zip(batch.row_ids.tolist(), batch.margins.tolist(), strict=True))

    assert margins(rows, rating_margins="large") == {0: 2, 1: 0, 2: 0}
    assert margins(Table(rows, rating_margins="small")) == pytest.approx({0: 2 / 3, 1: 0, 2: 0})
    assert margins(rows) == {0: 0, 1: 0, 2: 0}  # another entry of the cache
    ranking = {"prompt": "p", "responses": ["a", "b", "c"], "ranks": [1, 2, 3], "rating": "Better"}
    whole = PreferenceDataModule(
        tiny_tokenizer(), [ranking], validation_split=0.0, rating_margins="large", whole_rankings=True
    )
    whole.setup("fit")
    assert next(iter(whole.train_dataloader())).margins.tolist() == [[2, 2, 2]]
    with pytest.raises(UserError, match=r"row 1: rating 'good' is none of significantly_better, better, "):
        margins([*rows[:1], rated("good"), *rows[1:]], rating_margins="small")
    with pytest.raises(UserError, match="`rating_margins` beside Table has no effect"):
        margins(Table(rows), rating_margins="small")
