"""Data from Python: each kind gives the rows it holds, the same fingerprint for the same, and another for others."""

import json

import datasets
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.preparing import open_rows
from rlhf_lightning.data.sources import Table, as_source
from rlhf_lightning.data.sources.files import open_parts
from rlhf_lightning.errors import UserError

ROWS = [{"prompt": f"p{i}", "response": f"r{i}", "weight": float(i + 1)} for i in range(4)]


def columns_of(rows):
    return {name: [row.get(name) for row in rows] for name in rows[0]}


KINDS = {
    "list": list,
    "tuple": tuple,
    "columns": columns_of,
    "arrays": lambda rows: {name: np.array(values, dtype=object) for name, values in columns_of(rows).items()},
    "dataset": datasets.Dataset.from_list,
    "selected": lambda rows: datasets.Dataset.from_list(rows[::-1]).select(range(len(rows))[::-1]),
    "formatted": lambda rows: datasets.Dataset.from_list(rows).with_format("numpy"),
    "frame": pandas.DataFrame,
    "frame with an index": lambda rows: pandas.DataFrame(rows, index=[5] * len(rows)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_rows_in_either_way(kind):
    rows = open_rows(KINDS[kind](ROWS))
    assert rows.columns == list(ROWS[0])
    assert [dict(rows[i]) for i in range(len(rows))] == [dict(row) for _, row in rows.stream()] == ROWS
    assert json.loads(json.dumps(dict(rows[0]))) == ROWS[0]  # plain values, not those of a library


@pytest.mark.parametrize("kind", KINDS)
def test_a_fingerprint_is_that_of_the_content(kind):
    def fingerprint(rows):
        return as_source(KINDS[kind](rows)).open().fingerprint()

    others = [ROWS[:3], ROWS[::-1], [*ROWS[:3], ROWS[3] | {"response": "else"}]]
    prints = [fingerprint(rows) for rows in [ROWS, *others]]
    assert len(set(prints)) == 4
    assert fingerprint([dict(row) for row in ROWS]) == prints[0]


@given(st.lists(st.fixed_dictionaries({"prompt": st.one_of(st.none(), st.text()), "score": st.integers()}), min_size=1))
def test_frames_and_columns_hold_what_their_rows_hold(rows):
    for data in (columns_of(rows), pandas.DataFrame(rows, columns=["prompt", "score"])):
        opened = open_rows(data)
        assert [dict(opened[i]) for i in range(len(opened))] == rows


def test_what_a_frame_lacks_is_null_and_arrays_are_lists(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    pandas.DataFrame({"prompt": [messages, None], "score": [1.0, None]}).to_parquet(tmp_path / "x.parquet")
    rows = open_rows(pandas.read_parquet(tmp_path / "x.parquet"))  # with an array of dicts in its first cell
    assert [rows[0], rows[1]] == [{"prompt": messages, "score": 1.0}, {"prompt": None, "score": None}]


def test_long_arrays_within_rows_are_hashed_whole():
    def fingerprint(last):
        return open_rows([{"prompt": "p", "scores": np.append(np.zeros(5000), last)}]).fingerprint()

    assert fingerprint(1.0) == fingerprint(1.0) != fingerprint(2.0)


def test_a_dataset_dict_brings_its_parts():
    data = {name: datasets.Dataset.from_list(ROWS[:n]) for n, name in enumerate(("test", "valid", "train"), start=1)}
    table = Table(datasets.DatasetDict(data))
    parts = table.open_parts()
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 3, "validation": 2, "test": 1}
    assert [rows.source_names for rows in parts.values()] == [
        ["the DatasetDict"],
        ["the DatasetDict validation"],
        ["the DatasetDict test"],
    ]
    assert parts["validation"].place(0) == "the DatasetDict valid row 0"
    assert list(Table(datasets.DatasetDict(data), split="valid").open_parts()) == ["train"]


@pytest.mark.parametrize(
    ("data", "this"),
    [
        (7, "a int"),
        ({"prompt": "a", "response": "b"}, r"a dict whose values are not lists \(one row goes into a list\)"),
        (np.zeros(3), "a numpy.ndarray"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "a datasets.iterable_dataset.IterableDataset"),
        (iter(ROWS), "a list_iterator"),
    ],
)
def test_anything_else_is_one_line_that_names_what_is_accepted(data, this):
    with pytest.raises(UserError, match=rf"^data may be a path, .*a pandas DataFrame, [^\n]*; this is {this}$"):
        as_source(data)


def test_tables_that_make_no_rows_are_refused():
    with pytest.raises(UserError, match=r"the dict of columns differ in length \(prompt 2, response 1\)"):
        len(open_rows({"prompt": ["a", "b"], "response": ["c"]}))
    with pytest.raises(UserError, match="the DataFrame has several columns a; rename or drop all but one"):
        len(open_rows(pandas.DataFrame([[1, 2]], columns=["a", "a"])))
    changing = datasets.Dataset.from_list(ROWS).with_transform(lambda rows: rows)
    with pytest.raises(UserError, match="the Dataset has a transform set, which is not applied here"):
        open_parts(changing)
