"""Where preference data comes from: sources, chosen by class, that all give one type of row."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pytorch_lightning.utilities.rank_zero import rank_zero_info

from rlhf_lightning.arguments import POSITIVE, check_arguments
from rlhf_lightning.data.rows import BadRowError, DroppedRow, Need, Row
from rlhf_lightning.data.sources.blend import BlendRows
from rlhf_lightning.data.sources.files import is_local, open_files, open_parts
from rlhf_lightning.data.sources.python_rows import check_data, name_of
from rlhf_lightning.data.sources.ratings import RatingMargins, margins_of
from rlhf_lightning.data.sources.raw_rows import RawRow, RawRows
from rlhf_lightning.data.sources.row_forms import SAME, RowForm
from rlhf_lightning.data.sources.table_rows import Rows, TableRows
from rlhf_lightning.errors import UserError

__all__ = [
    "TLDR",
    "Blend",
    "DataSource",
    "HelpfulHarmless",
    "Rows",
    "Source",
    "Table",
    "as_source",
    "is_local",
    "source_name",
]

_SUMMARY_MARK = "TL;DR:"
_RED_TEAM = "red-team-attempts"

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from pandas import DataFrame

    Data: TypeAlias = str | Path | Sequence[Any] | Mapping[str, Sequence[Any]] | Dataset | DatasetDict | DataFrame
else:
    # What only Python can give stays out of the types that the command line reads.
    Data = str | Path | list[dict[str, Any]] | list[str] | dict[str, list[Any]]


class Source(ABC):
    """A description of where rows come from, cheap to make and to pickle; `open` reads.

    Attributes:
        name: as reports and error messages say it.
        streaming: the rows are to be read in order only.
        attributes: names of the scores that its responses are given.
        ratings: the margin of each rating; None where ratings are not read.
    """

    name: str
    streaming: bool = False
    attributes: tuple[str, ...] = ()
    ratings: dict[str, float] | None = None

    @abstractmethod
    def open(self) -> Rows:
        """Open the rows.

        Raises:
            UserError: nothing there, or a file that cannot be read at all.
        """

    def open_parts(self) -> dict[str, Rows]:
        """Open the rows by part: `train`; `validation` and `test` where the data bring such splits, and none was named.

        Raises:
            UserError: as in `open`.
        """
        return {"train": self.open()}


class _TableSource(Source):
    """A source that is one table, or one for each part."""

    def open(self) -> Rows:
        """Open the rows, see `Source`."""
        return self.open_parts()["train"]

    def open_parts(self) -> dict[str, Rows]:
        """Open the rows by part, see `Source`."""
        names = {"train": self.name}
        return {part: self._rows(raw, names.get(part, f"{self.name} {part}")) for part, raw in self._raw().items()}

    @abstractmethod
    def _raw(self) -> dict[str, RawRows]:
        """The raw rows of each part."""

    @abstractmethod
    def _rows(self, raw: RawRows, name: str) -> Rows:
        """The rows of one part."""


class Table(_TableSource):
    """Anything with rows and columns; `rlhf_lightning.data.sources.row_forms` says which forms of row are known.

    Args:
        path: a file (.json, .jsonl, .csv, .tsv, .parquet, each possibly .gz), a list, folder or glob of such files, a
            folder written by `save_to_disk`, a hub id `owner/name` or `owner/name:split`; from Python also a list of
            dicts, a dict of columns, a `datasets.Dataset` or `DatasetDict`, or a pandas DataFrame.
        columns: our column names (prompt, response, chosen, rejected, messages and more) to those of the data.
        split: the only split to read, where the data have several; by default `train` is trained on, and the data's
            own `validation` and `test` are used as such.
        name: how reports name the source; by default its path.
        streaming: read the rows in order as they arrive, never by number: for data that does not fit the disk.
        rating_margins: the margin of each rating that stands in a column `rating`, `{much_better: 1, better: 0.5}`;
            `small` or `large` for those of Llama 2. By default ratings are not read.
        attributes: names of the scores that responses are given, each a column of numbers.
    """

    def __init__(
        self,
        path: Data,
        columns: dict[str, str] | None = None,
        split: str | None = None,
        name: str | None = None,
        streaming: bool = False,
        rating_margins: RatingMargins | None = None,
        attributes: list[str] | None = None,
    ) -> None:
        check_arguments(Table, locals())
        self.ratings = None if rating_margins is None else margins_of(rating_margins)
        self.attributes = tuple(attributes or ())
        self.path, self.columns, self.split, self.streaming = path, columns, split, streaming
        self.name = name or source_name(path)

    def _raw(self) -> dict[str, RawRows]:
        return open_parts(self.path, self.split, self.streaming)

    def _rows(self, raw: RawRows, name: str) -> Rows:
        form = partial(RowForm, names=self.columns, source=name, attributes=self.attributes, ratings=self.ratings)
        rated: list[Any] = [list(self.attributes)] if self.attributes else []
        rated += [] if self.ratings is None else [self.ratings]
        return TableRows(raw, name, form, ["table", self.columns, *rated], self.streaming)


class HelpfulHarmless(_TableSource):
    r"""Anthropic's helpful and harmless preferences (Bai et al. 2022), as pairs of whole dialogues or as prompts apart.

    Dialogues are split at the last `\n\nAssistant:`; pairs whose prompts differ are dropped and counted.

    Args:
        path: a hub id (`Anthropic/hh-rlhf`, or `Dahoas/full-hh-rlhf` with prompt, chosen and rejected apart), or a
            file, glob or folder of either form; a folder may be a copy of the repository.
        subset: folder within it, such as `helpful-base`; by default all but the red team's.
        split: `train` or `test`; by default `train` is trained on, and `test` is tested on.
        streaming: read the rows in order as they arrive, never by number.
    """

    def __init__(
        self,
        path: str | Path = "Anthropic/hh-rlhf",
        subset: str | None = None,
        split: str | None = None,
        streaming: bool = False,
    ) -> None:
        check_arguments(HelpfulHarmless, locals())
        self.path, self.subset, self.split, self.streaming = path, subset, split, streaming
        self.name = f"{path} {subset}" if subset else str(path)

    def _rows(self, raw: RawRows, name: str) -> Rows:
        return TableRows(raw, name, partial(self._form, name), ["helpful-harmless"], self.streaming)

    def _form(self, name: str, columns: Sequence[str]) -> RowForm:
        known = ("prompt", "response", "chosen", "rejected")
        return RowForm([column for column in columns if column in known], source=name)

    def _raw(self) -> dict[str, RawRows]:
        if not is_local(self.path):
            return open_parts(str(self.path), self.split, self.streaming, self.subset)
        folder = Path(self.path).expanduser() / (self.subset or "")
        splits = ("train", "test") if self.split is None else (self.split,)
        found = {split: self._files(folder, split) for split in splits}
        if not found[splits[0]]:
            return open_parts(folder, self.split)
        return {"train" if split == splits[0] else split: open_files(files) for split, files in found.items() if files}

    def _files(self, folder: Path, split: str) -> list[Path]:
        files = sorted(folder.glob(f"{split}.jsonl*")) or sorted(folder.glob(f"*/{split}.jsonl*"))
        return [file for file in files if self.subset == _RED_TEAM or file.parent.name != _RED_TEAM]


class TLDR(_TableSource):
    r"""Posts to be summarised (Stiennon et al. 2020), with compared summaries or with the one their author wrote.

    Every prompt ends with exactly one `\n\nTL;DR:`, which is never cut away, and no response begins with another. A
    post that is too long is cut at the end of a paragraph.

    Args:
        path: a hub id (`CarperAI/openai_summarize_comparisons` with prompt, chosen and rejected, or
            `CarperAI/openai_summarize_tldr` with prompt and label), or a file, glob or folder of either form.
        split: the only split to read, where the data have several, as in `Table`.
        streaming: read the rows in order as they arrive, never by number.
    """

    def __init__(
        self,
        path: str | Path = "CarperAI/openai_summarize_comparisons",
        split: str | None = None,
        streaming: bool = False,
    ) -> None:
        check_arguments(TLDR, locals())
        self.path, self.split, self.streaming = path, split, streaming
        self.name = str(path)

    def _raw(self) -> dict[str, RawRows]:
        return open_parts(self.path, self.split, self.streaming)

    def _rows(self, raw: RawRows, name: str) -> Rows:
        return TableRows(raw, name, partial(_SummaryForm, source=name), ["tl;dr"], self.streaming)


class _SummaryForm(RowForm):
    """Posts with summaries; `label` holds the author's."""

    def __init__(self, columns: Sequence[str], source: str) -> None:
        known = [name for name in columns if name in ("prompt", "chosen", "rejected", "label")]
        super().__init__(known, {"response": "label"} if "label" in known else None, source)

    def read(self, raw: RawRow, need: Need) -> Row:
        """One row, its prompt without the mark that its suffix has, its responses without it too."""
        row = super().read(raw, need)
        if not isinstance(row.prompt, str):
            raise BadRowError("prompt is not text but a list of messages")
        said = [text for text in row.responses if isinstance(text, str)]
        if len(said) < len(row.responses):
            raise BadRowError("response is not text but a message")
        post = row.prompt.rstrip().removesuffix(_SUMMARY_MARK).rstrip()
        responses = [text.strip().removeprefix(_SUMMARY_MARK).strip() for text in said]
        if not post:
            raise BadRowError(f"prompt is empty but for {_SUMMARY_MARK}")
        if "" in responses:
            raise BadRowError(f"a response is empty but for {_SUMMARY_MARK}")
        if len(responses) > 1 and len(set(responses)) == 1:
            raise DroppedRow(SAME)
        spaced = tuple(f" {text}" for text in responses)
        return row._replace(prompt=post, responses=spaced, suffix=f"\n\n{_SUMMARY_MARK}")


class Blend(Source):
    """Several sources as one, with weights.

    Args:
        sources: one after the other.
        weights: how often each row of that source is seen in an epoch: 1 is once, 0.5 a new random half of the rows in
            each epoch, 2 twice. By default 1 each.

    Raises:
        UserError: no sources, or weights that do not go with them.
    """

    def __init__(self, sources: list[Source], weights: list[float] | None = None) -> None:
        if not sources:
            raise UserError("a blend needs at least one source; list them in `sources`")
        check_arguments(Blend, locals(), {"weights": POSITIVE})
        weights = [1.0] * len(sources) if weights is None else weights
        if len(weights) != len(sources):
            raise UserError(f"a blend of {len(sources)} sources has {len(weights)} weights; give one for each")
        if len({source.streaming for source in sources}) > 1:
            raise UserError("a blend is streamed whole or not at all; give all its sources the same `streaming`")
        if len({source.attributes for source in sources}) > 1:
            raise UserError("the sources of a blend have different attributes; give all of them the same")
        self.sources, self.weights = sources, weights
        self.attributes = sources[0].attributes
        first = sources[0].ratings
        self.ratings = first if all(source.ratings == first for source in sources) else None
        self.streaming = sources[0].streaming
        self.name = " + ".join(source.name for source in sources)

    def open(self) -> Rows:
        """Open all sources, see `Source`."""
        return self.open_parts()["train"]

    def open_parts(self) -> dict[str, Rows]:
        """Open all sources by part; a part that not all of them have is left out, and that is said."""
        opened = [source.open_parts() for source in self.sources]
        parts: dict[str, Rows] = {"train": BlendRows([parts["train"] for parts in opened], self.weights)}
        for part in ("validation", "test"):
            having = [source.name for source, parts in zip(self.sources, opened, strict=True) if part in parts]
            if len(having) == len(opened):
                parts[part] = BlendRows([parts[part] for parts in opened], [1.0] * len(opened))
            elif having:
                rank_zero_info(
                    f"the {part} split of {', '.join(having)} is not read, as not all sources of the blend have one; "
                    f"give `{part}_data` to use it"
                )
        return parts


DataSource: TypeAlias = Source | Data  # in this order, or a config would be saved with sources as text


def as_source(
    data: DataSource,
    columns: Mapping[str, str] | None = None,
    attributes: Sequence[str] = (),
    rating_margins: RatingMargins | None = None,
) -> Source:
    """Data as a source: anything but a source is a table.

    Args:
        data: what the user gave.
        columns: our column names to those of the data; a source has its own.
        attributes: names of the scores that responses are given; those of a source must be the same.
        rating_margins: as `Table` takes them; likewise.

    Raises:
        UserError: a source and columns beside it, other attributes than a source's, or something that is not data.
    """
    if not isinstance(data, Source):
        check_data(data)
        return Table(
            data, dict(columns) if columns else None, rating_margins=rating_margins, attributes=list(attributes)
        )
    if tuple(attributes) != data.attributes and attributes:
        theirs = ", ".join(data.attributes) or "none"
        raise UserError(
            f"attributes {', '.join(attributes)} are not those of {data.name} ({theirs}): give both the same"
        )
    for name, given in (("columns", columns), ("rating_margins", rating_margins)):
        if given:
            raise UserError(
                f"`{name}` beside {type(data).__name__} has no effect; give them to the source, as in Table's"
            )
    return data


def source_name(data: DataSource) -> str:
    """The name of data as error messages say it."""
    if isinstance(data, Source):
        return data.name
    return name_of(data)
