"""Ratings in words as the margins that they stand for."""

from __future__ import annotations

import warnings

import pytest

from helpers.tokenizers import tiny_tokenizer
from rlhf_lightning import PreferenceDataModule, Table, UserError
from rlhf_lightning.cli.prepare import prepare
from rlhf_lightning.data.preparing.filters import Filters
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
    assert [read(rated(each), ratings).margin for each in ("much better", 2, 2.0, "2", "2.0", None, "")] == [
        0.5,
        *[0.25] * 4,
        *[0] * 2,
    ]
    named = PAIR | {"confidence": "much_better"}
    assert read(named, ratings, {"rating": "confidence"}).margin == 0.5
    assert read(PAIR | {"margin": 7}, ratings).margin == 7


def test_without_a_table_ratings_are_named_as_unread():
    row = read(rated("whatever"), None)
    assert (row.margin, row.unused) == (0, ("column 'rating'",))
    assert read(rated("better"), "small").unused == ()


@pytest.mark.parametrize("need", ["finetune", "prompts"])
def test_what_only_pairs_have_a_use_for_is_named_where_no_pair_is_made(need):
    row = PAIR | {"margin": 2.0, "weight": 3.0}
    assert RowForm(list(row)).read(row, "preference").unused == ()
    assert RowForm(list(row)).read(row, need).unused == ("column 'margin'", "column 'weight'")
    asked = {"rating": "p", "chosen": "r", "rejected": "x"}  # under a name of ours that means something else
    assert RowForm(list(asked), {"prompt": "rating"}).read(asked, need).unused == ()


@pytest.mark.parametrize("rating", ["great", " ", True, 1, ["better"]])
def test_an_unknown_rating_names_those_that_are_known(rating):
    with pytest.raises(BadRowError, match=r"rating .* is none of much_better, same$"):
        read(rated(rating), {"much better": 1, "same": 0})
    with pytest.raises(BadRowError, match="rating stands beside a margin"):
        read_rating("same", "rating", {"same": 0.0}, 0.0)


@pytest.mark.parametrize("spelling", [float, str, int, lambda value: f"{value}.0"])
def test_a_rating_below_0_keeps_its_sign(spelling):
    ratings = {"-1": 0.0, "1": 1.0}
    assert [read(rated(spelling(each)), ratings).margin for each in (-1, 1)] == [0, 1]
    with pytest.raises(BadRowError, match=r"is none of 3$"):
        read(rated(spelling(-3)), {"3": 3.0})


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


def test_a_prepared_folder_has_the_margins_that_it_was_prepared_with(tmp_path):
    folder, rows = str(tmp_path / "tokenizer"), [rated("better", prompt=str(i)) for i in range(4)]
    tiny_tokenizer().save_pretrained(folder)
    for out, given in (("without", {}), ("large", {"rating_margins": "large"})):
        prepare(tmp_path / out, folder, rows, validation_split=0.25, **given)

    def margins(name, **given):
        module = PreferenceDataModule(folder, str(tmp_path / name), **given)
        module.setup("fit")
        return next(iter(module.train_dataloader())).margins.tolist()

    assert margins("large") == margins("large", rating_margins="large") == [2, 2, 2]
    assert margins("without") == [0, 0, 0]
    for name, ratings, how in (("without", "large", "without"), ("large", "small", "with other")):
        with pytest.raises(UserError, match=f"was prepared {how} rating_margins: leave them out here"):
            margins(name, rating_margins=ratings)


def test_a_prepared_folder_says_which_settings_it_does_not_heed(tmp_path):
    folder, rows = str(tmp_path / "tokenizer"), [rated("better", prompt=str(i)) for i in range(8)]
    tiny_tokenizer().save_pretrained(folder)
    prepare(tmp_path / "six", folder, rows, num_samples=6, kinds=["preference"])
    said = "with other filters and num_samples; a prepared folder is read as it is"
    with pytest.warns(UserWarning, match=said):
        PreferenceDataModule(folder, str(tmp_path / "six"), num_samples=4, filters=Filters(shuffle=True)).setup("fit")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*read as it is.*")
        PreferenceDataModule(folder, str(tmp_path / "six"), num_samples=6).setup("fit")
        PreferenceDataModule(folder, str(tmp_path / "six")).setup("fit")
