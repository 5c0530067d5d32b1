"""Data given from Python: lists of dicts, dicts of columns, data frames, data sets of `datasets`, lists of paths."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_lightning.data.sources.raw_rows import ListRows, RawRows, column_rows
from rlhf_lightning.errors import UserError

ACCEPTED = (
    "a path, a list of paths, a hub id, a list of dicts, a dict of columns, a datasets.Dataset or DatasetDict, a "
    "pandas DataFrame, or a source such as rlhf_lightning.Table"
)


def check_data(data: Any) -> None:
    """Refuse data of a kind that is not read.

    Raises:
        UserError: it is something else; the line says what is accepted.
    """
    if isinstance(data, str | Path | list | tuple) or _is_dataset(data) or _is_frame(data) or _is_columns(data):
        return
    raise UserError(f"data may be {ACCEPTED}; this is {_describe(data)}")


def names_paths(data: Any) -> bool:
    """Whether data is a list of paths."""
    return isinstance(data, list | tuple) and bool(data) and all(isinstance(item, str | Path) for item in data)


def name_of(data: Any) -> str:
    """The name of data as reports and error messages say it."""
    if names_paths(data):
        more = f" and {len(data) - 3} more files" if len(data) > 3 else ""
        return ", ".join(map(str, data[:3])) + more
    if isinstance(data, list | tuple):
        return "the list of rows"
    if isinstance(data, str | Path):
        return str(data)
    return "the dict of columns" if type(data) is dict else f"the {type(data).__name__}"


def open_object(
    data: Any,
    choose: Callable[[Iterable[str], str], Mapping[str, str]],
    hash_of_file: Callable[[Path], str],
    name: str | None = None,
) -> dict[str, RawRows]:
    """The rows of an object by part.

    Args:
        data: a list of dicts, a dict of columns, a DataFrame, a Dataset, or a DatasetDict, which may have parts.
        choose: from the names of splits and that of the data to the split of each part.
        hash_of_file: hashes a file that a data set lies in.
        name: begins the places of rows; by default `name_of`.

    Raises:
        UserError: anything else, or columns that make no rows.
    """
    name = name or name_of(data)
    if _is_dataset(data):
        from rlhf_lightning.data.sources.arrow_rows import DatasetRows

        if not isinstance(data, dict):
            return {"train": DatasetRows(data, name, hash_of_file)}
        splits = choose(data, name)
        return {part: DatasetRows(data[split], f"{name} {split}", hash_of_file) for part, split in splits.items()}
    if _is_frame(data):
        return {"train": ListRows(partial(_frame_rows, data), f"{name} row")}
    if isinstance(data, dict):
        return {"train": ListRows(partial(column_rows, data, name), f"{name} row")}
    return {"train": ListRows(list(data), f"{name} row")}


def _frame_rows(frame: Any) -> list[dict[str, Any]]:
    """The rows of a DataFrame; what is missing there (NaN, NaT) is null."""
    columns = [str(column) for column in frame.columns]
    if twice := sorted({column for column in columns if columns.count(column) > 1}):
        raise UserError(f"the DataFrame has several columns {', '.join(twice)}; rename or drop all but one")
    values = frame.astype(object).where(frame.notna(), None)
    return column_rows(
        dict(zip(columns, (values.iloc[:, i] for i in range(len(columns))), strict=True)), "the DataFrame"
    )


def _is_columns(data: Any) -> bool:
    return type(data) is dict and all(
        isinstance(values, list | tuple) or hasattr(values, "tolist") for values in data.values()
    )


def _is_dataset(data: Any) -> bool:
    """Whether it is a Dataset or DatasetDict; the library is slow to import, and loaded wherever there is one."""
    library = sys.modules.get("datasets")
    return library is not None and isinstance(data, library.Dataset | library.DatasetDict)


def _is_frame(data: Any) -> bool:
    library = sys.modules.get("pandas")
    return library is not None and isinstance(data, library.DataFrame)


def _describe(data: Any) -> str:
    if type(data) is dict:
        return "a dict whose values are not lists (one row goes into a list)"
    return f"a {type(data).__module__}.{type(data).__qualname__}".replace("builtins.", "")
